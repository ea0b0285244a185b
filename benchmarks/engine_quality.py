"""What rounded weights cost: greedy answers and nats per token of each kind of weights, against transformers.

It prints one JSON object and puts it into benchmarks/results/engine.json under "quality".
Read first: float32 must give the very tokens of `transformers`; a prompt on which it does not is named, with both best
logits, since a tie within float32's own error may fall either way.

    python benchmarks/engine_quality.py --prompts 120
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any, get_args

import torch

from greenroom.cli.places import cache_folder
from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel
from runtime.engine.step_model import load_dtype, make_step_model
from runtime.kernels.step_kinds import WeightKind
from runtime.model.base import BaseModel, load_base, resolve_base
from training.reference_prompts import reference_prompts

RESULTS = Path(__file__).parent / "results" / "engine.json"
NEW_TOKENS = 32
CPU = torch.device("cpu")


def ask_transformers(base: BaseModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of `NEW_TOKENS` tokens, each prompt alone."""
    answers = []
    for prompt in prompts:
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
        answers.append(found[0, len(prompt) :].tolist())
    return answers


class Asker:
    """Greedy answers and losses of a step model, one sequence at a time."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._cache = KVCache(model.kv_shape(), num_slots=1, budget_bytes=1 << 40, dtype=model.kv_dtype, device=CPU)

    def _run(self, ids: list[int], start: int) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self._model.embed(torch.tensor(ids))
            plan = AttentionPlan([], [Segment(0, start, len(ids))], CPU)
            self._model.run_layers(hidden, range(len(self._model.layers)), plan, self._cache, None)
            return self._model.logits(hidden)

    def answer(self, prompt: list[int], banned: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """Tokens, and by how much each was ahead of the next best; end tokens are banned, as in `ask_transformers`."""
        tokens: list[int] = []
        leads: list[float] = []
        logits = self._run(prompt, 0)[-1].clone()  # an inference tensor takes no ban
        while True:
            logits[list(banned)] = -torch.inf
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
            if len(tokens) == NEW_TOKENS:
                return tokens, leads
            logits = self._run(tokens[-1:], len(prompt) + len(tokens) - 1)[-1].clone()

    def loss(self, prompt: list[int], answer: list[int]) -> float:
        """Nats per token of an answer."""
        logits = self._run([*prompt, *answer[:-1]], 0)[len(prompt) - 1 :]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))


def judge(asker: Asker, prompts: list[list[int]], expected: list[list[int]], banned: tuple[int, ...]) -> dict[str, Any]:
    """Shares of equal answers and tokens, and the mean loss of the expected answers."""
    equal, same, different = 0, 0, []
    for number, (prompt, wanted) in enumerate(zip(prompts, expected, strict=True)):
        got, leads = asker.answer(prompt, banned)
        place = next((i for i in range(NEW_TOKENS) if got[i] != wanted[i]), NEW_TOKENS)
        equal += place == NEW_TOKENS
        same += place
        if place < NEW_TOKENS:
            different.append({"prompt": number, "token": place, "lead": round(leads[place], 6)})
    losses = [asker.loss(prompt, wanted) for prompt, wanted in zip(prompts, expected, strict=True)]
    return {
        "answers_equal": round(equal / len(prompts), 4),
        "tokens_before_first_difference": round(same / (NEW_TOKENS * len(prompts)), 4),
        "nats_per_token": round(sum(losses) / len(losses), 4),
        "different": different[:5],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place = resolve_base("smollm2", cache=cache_folder())
    base = load_base(place, dtype=torch.float32, device=CPU)
    prompts = [base.tokenizer(text)["input_ids"] for text in reference_prompts()[: options.prompts]]
    expected = ask_transformers(base, prompts)
    found: dict[str, Any] = {"prompts": len(prompts), "new_tokens": NEW_TOKENS}
    for weights in get_args(WeightKind):
        torch.set_num_threads(options.threads)
        base = load_base(place, dtype=load_dtype(weights), device=CPU)
        model = make_step_model(
            base.model,
            max_context=256,
            weights=weights,
            step="auto",
            folder=cache_folder() / "native",
            threads=options.threads,
        )
        found[weights] = judge(Asker(model), prompts, expected, base.eos_token_ids)
        print(weights, json.dumps(found[weights]), flush=True)
        del model, base
        gc.collect()
    held = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    options.output.write_text(json.dumps(held | {"quality": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
