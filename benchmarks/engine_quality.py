"""What rounded weights cost: greedy answers and nats per token of each kind of weights, against transformers.

It writes benchmarks/results/engine_quality.json.
Read first: float32 must give the very tokens of `transformers`; a prompt on which it does not is named, with the lead
of the token that was chosen, since a tie within float32's own error may fall either way. The native step's answers in
batches of eight must be those that it gives alone, and the step on torch's operations those of `transformers` too.

    python benchmarks/engine_quality.py --prompts 120
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from greenroom.cli.places import cache_folder
from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel
from runtime.engine.step_model import load_dtype, make_step_model
from runtime.kernels.step_kinds import StepKind, WeightKind
from runtime.model.base import BaseModel, load_base, resolve_base
from training.reference_prompts import reference_prompts

RESULTS = Path(__file__).parent / "results" / "engine_quality.json"
NEW_TOKENS = 32
TOGETHER = 8
OURS: tuple[WeightKind, ...] = ("float32", "bfloat16", "int8", "int4")
CPU = torch.device("cpu")


class Answer(NamedTuple):
    """Tokens, and by how much each was ahead of the next best."""

    tokens: list[int]
    leads: list[float]


def ask_transformers(base: BaseModel, prompts: list[list[int]], guesses: list[list[int]]) -> list[list[int]]:
    """Greedy answers, each prompt alone; end tokens are banned.

    An answer is that of `guesses` if every token of it is the best after those before, which one pass over all of them
    shows; only where one is not the answer is made token by token.
    """
    return [
        guess if _best_after(base, prompt, guess) == guess else _generate(base, prompt)
        for prompt, guess in zip(prompts, guesses, strict=True)
    ]


def _best_after(base: BaseModel, prompt: list[int], answer: list[int]) -> list[int]:
    """The best next token at each place of an answer."""
    with torch.inference_mode():
        logits = base.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        logits[:, list(base.eos_token_ids)] = -torch.inf
    found: list[int] = logits.argmax(dim=1).tolist()
    return found


def _generate(base: BaseModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = base.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


class Asker:
    """Greedy answers and losses of a step model.

    Args:
        model: runs on the CPU.
        together: sequences that share its steps at most.
    """

    def __init__(self, model: LlamaModel, together: int = 1) -> None:
        self._model = model
        self._together = together
        self._cache = KVCache(
            model.kv_shape(), num_slots=together, budget_bytes=1 << 40, dtype=model.kv_dtype, device=CPU
        )

    def _run(self, ids: list[int], plan: AttentionPlan) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self._model.embed(torch.tensor(ids))
            self._model.run_layers(hidden, range(len(self._model.layers)), plan, self._cache, None)
            return self._model.logits(hidden)

    def answers(self, prompts: list[list[int]], banned: tuple[int, ...]) -> list[Answer]:
        """To each prompt `NEW_TOKENS` tokens; end tokens are banned, as in `ask_transformers`."""
        found = []
        for begin in range(0, len(prompts), self._together):
            found += self._at_once(prompts[begin : begin + self._together], banned)
        return found

    def _at_once(self, prompts: list[list[int]], banned: tuple[int, ...]) -> list[Answer]:
        made = [Answer([], []) for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        segments = [Segment(slot, 0, length) for slot, length in enumerate(lengths)]
        logits = self._run([token for prompt in prompts for token in prompt], AttentionPlan([], segments, CPU))
        logits = logits[[end - 1 for end in accumulate(lengths)]]
        for step in range(NEW_TOKENS):
            logits = logits.clone()  # what inference mode made takes no bans
            logits[:, list(banned)] = -torch.inf
            best = logits.topk(2)
            for answer, ids, values in zip(made, best.indices.tolist(), best.values.tolist(), strict=True):
                answer.tokens.append(ids[0])
                answer.leads.append(values[0] - values[1])
            if step + 1 < NEW_TOKENS:
                places = [(slot, length + step) for slot, length in enumerate(lengths)]
                logits = self._run([answer.tokens[-1] for answer in made], AttentionPlan(places, [], CPU))
        return made

    def loss(self, prompt: list[int], answer: list[int]) -> float:
        """Nats per token of an answer."""
        ids = [*prompt, *answer[:-1]]
        logits = self._run(ids, AttentionPlan([], [Segment(0, 0, len(ids))], CPU))[len(prompt) - 1 :]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))


def compare(answers: list[Answer], expected: list[list[int]]) -> dict[str, Any]:
    """Shares of equal answers, and of tokens before the first that differs; the first few that do."""
    equal, same, different = 0, 0, []
    for number, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        place = next((i for i in range(NEW_TOKENS) if answer.tokens[i] != wanted[i]), NEW_TOKENS)
        equal += place == NEW_TOKENS
        same += place
        if place < NEW_TOKENS:
            different.append({"prompt": number, "token": place, "lead": round(answer.leads[place], 6)})
    return {
        "answers_equal": round(equal / len(expected), 4),
        "tokens_before_first_difference": round(same / (NEW_TOKENS * len(expected)), 4),
        "different": different[:5],
    }


def judge(
    model: LlamaModel, prompts: list[list[int]], expected: list[list[int]], banned: tuple[int, ...], alone: list[Answer]
) -> dict[str, Any]:
    """Against transformers; what the expected answers cost; and whether a batch changes an answer."""
    together = Asker(model, TOGETHER).answers(prompts, banned)
    asker = Asker(model)
    losses = [asker.loss(prompt, wanted) for prompt, wanted in zip(prompts, expected, strict=True)]
    nats = sum(losses) / len(losses)
    return {
        **compare(alone, expected),
        "nats_per_token": round(nats, 4),
        "perplexity": round(math.exp(nats), 4),
        "batches_equal_alone": compare(together, [answer.tokens for answer in alone])["answers_equal"],
    }


def load_model(place: Path, weights: WeightKind, step: StepKind, threads: int) -> LlamaModel:
    """The base on one of our steps."""
    torch.set_num_threads(threads)
    model = make_step_model(
        load_base(place, dtype=load_dtype(weights), device=CPU).model,
        max_context=256,
        weights=weights,
        step=step,
        folder=cache_folder() / "native",
        threads=threads,
    )
    assert isinstance(model, LlamaModel), "the base is of the Llama family"
    return model


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    started = time.perf_counter()
    place = resolve_base("smollm2", cache=cache_folder())
    base = load_base(place, dtype=torch.float32, device=CPU)
    banned = base.eos_token_ids
    prompts = [base.tokenizer(text)["input_ids"] for text in reference_prompts()[: options.prompts]]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "command": "python " + " ".join(sys.argv),
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS,
        "together": TOGETHER,
    }
    expected: list[list[int]] = []
    kinds: tuple[tuple[WeightKind, StepKind], ...] = (*((kind, "auto") for kind in OURS), ("float32", "torch"))
    for weights, step in kinds:
        model = load_model(place, weights, step, options.threads)
        alone = Asker(model).answers(prompts, banned)
        if not expected:
            torch.set_num_threads(options.threads)
            expected = ask_transformers(base, prompts, [answer.tokens for answer in alone])
            del base
        name = weights if step == "auto" else f"{weights} on torch's operations"
        found[name] = judge(model, prompts, expected, banned, alone)
        print(name, json.dumps(found[name]), flush=True)
        del model
        gc.collect()
    found["seconds"] = round(time.perf_counter() - started)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
