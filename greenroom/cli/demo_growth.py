"""Whether the newest generation left the outputs of older tasks as they were, bit for bit.

It knows nothing of how generations are made; it runs the same prompts on two engines over the same weights.
Read first: what is compared are the float32 logits of every generated token, not only the text.
"""

import threading
from pathlib import Path

import torch

from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.llama import LlamaModel
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams
from runtime.model.base import load_base, resolve_base
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire
from training.data import read_tasks

_PROMPTS_PER_TASK = 8
_MAX_TOKENS = 12


def old_tasks_bit_identical(folder: Path, data: Path) -> bool:
    """Answer prompts of all tasks but the newest with the newest generation and with the one before it.

    Returns:
        whether every logit of every generated token is the same in both.
    """
    repertoire = Repertoire(folder)
    newest = repertoire.manifest()
    assert newest.parent is not None, "growth needs two generations"
    older = repertoire.manifest(newest.parent).task_names()
    prompts = [
        (task.name, example.input)
        for task in read_tasks(data)
        if task.name in older
        for example in task.test[:_PROMPTS_PER_TASK]
    ]
    base = load_base(
        resolve_base(newest.base.name, cache=cache_folder()), dtype=torch.float32, device=torch.device("cpu")
    )
    model = LlamaModel(base.model, max_context=256)
    outputs = []
    for number in (newest.parent, newest.generation):
        engine = Engine(
            model,
            base.tokenizer,
            base.eos_token_ids,
            repertoire=repertoire,
            generation=open_generation(repertoire, number),
            options=EngineOptions(max_context=256),
        )
        engine.start()
        outputs.append([_logits(engine, task, prompt) for task, prompt in prompts])
        engine.close()
    return outputs[0] == outputs[1]


def _logits(engine: Engine, task: str, prompt: str) -> bytes:
    ended = threading.Event()
    last: list[Event] = []

    def sink(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            last.append(event)
            ended.set()

    sampling = SamplingParams(max_tokens=_MAX_TOKENS)
    request = Request(request_id="growth", text=prompt, task=task, sampling=sampling, keep_logits=True)
    engine.submit(request, sink)
    ended.wait()
    if isinstance(last[0], Failed):
        raise last[0].error
    assert isinstance(last[0], Finished), "a request ends with one of two events"
    return last[0].logits
