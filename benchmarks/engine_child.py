"""One Greenroom engine in a process of its own, for benchmarks/engine.py: a workload per line in, a row per line out.

It does not know the peers.
Read first: W1-W4 serve PEFT adapters of rank 8 on all seven linears, adopted into a repertoire; W6 and W7 serve eight
synthetic tasks that each see all eight expert sets, top-2 per token and layer, found by the locator.

    echo W3 | python benchmarks/engine_child.py --weights int8 --folder build/engine --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from peak_memory import peak_mb
from synthetic import make_repertoire, prompt_of

from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.native_llama import NativeLlama
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams, TokenDelta
from runtime.engine.step_model import load_step_model
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire
from runtime.model.stored_base import open_base

PROMPT_TOKENS = NEW_TOKENS = 64
NUM_ADAPTERS = 16
TOPICS = (
    *("rivers", "copper", "bread", "lighthouses", "sorting", "moons", "violins", "volcanoes"),
    *("taxes", "bees", "submarines", "Rome", "gardens", "railways", "vaccines", "chess"),
)
PLAIN = {  # name -> which adapter each of the sequences uses
    "W1": [0],
    "W2": [0] * 8,
    "W3": list(range(8)),
    "W4": list(range(16)),
    "W5b1": [None],
    "W5b8": [None] * 8,
    "W5b16": [None] * 16,
}


class Asked:
    """One request: the times at which its tokens came, since `start`."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._ended = threading.Event()
        self._error: Exception | None = None
        self.times: list[float] = []
        self.tokens: list[int] = []

    def sink(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, TokenDelta):
            self.times += [time.perf_counter() - self._start] * len(event.token_ids)
            self.tokens += event.token_ids
        elif isinstance(event, Failed):
            self._error = event.error
        if isinstance(event, Finished | Failed):
            self._ended.set()

    def wait(self) -> None:
        """Wait for the end."""
        if not self._ended.wait(600):
            raise SystemExit("a request did not end within 600 s")
        if self._error is not None:
            raise self._error


class Bench:
    """Engines on one base.

    Args:
        weights: how the base is kept.
        step: "native" or "torch".
        folder: where adapters and repertoires lie, or are made.
        threads: that compute.
    """

    def __init__(self, weights: str, step: str, folder: Path, threads: int) -> None:
        start = time.perf_counter()
        torch.set_num_threads(threads)
        self._folder = folder
        self._base = open_base("smollm2", cache=cache_folder())
        self._model = load_step_model(
            self._base,
            device=torch.device("cpu"),
            max_context=256,
            weights=weights,  # type: ignore[arg-type]
            step=step,  # type: ignore[arg-type]
            folder=cache_folder() / "native",
            threads=threads,
            kernels=folder / "none",
        )
        self._engines: dict[str, Engine] = {}
        self.start_s = time.perf_counter() - start
        self._count = 0
        self._prompts = [self._prompt(topic) for topic in TOPICS]

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = self._started(name)
        return self._engines[name]

    def _started(self, name: str) -> Engine:
        repertoire = Repertoire(self._folder / name)
        engine = Engine(
            self._model,
            self._base.tokenizer,
            self._base.eos_token_ids,
            repertoire=repertoire,
            generation=open_generation(repertoire),
            # No prompt is remembered from an earlier round, as in the peers.
            options=EngineOptions(max_context=256, kv_budget_bytes=512 << 20, prefix_budget_bytes=0),
        )
        engine.start()
        return engine

    def _prompt(self, topic: str) -> str:
        """Text of exactly 64 tokens."""
        text = f"Write a careful, detailed explanation about {topic} for a curious reader, with three examples. "
        tokenizer = self._base.tokenizer.backend_tokenizer
        ids = tokenizer.encode(text * 8, add_special_tokens=False).ids
        for length in range(PROMPT_TOKENS, len(ids)):
            cut: str = tokenizer.decode(ids[:length])
            if len(tokenizer.encode(cut, add_special_tokens=False).ids) == PROMPT_TOKENS:
                return cut
        raise SystemExit(f"no text of {PROMPT_TOKENS} tokens about {topic}")

    def run(self, workload: str, new_tokens: int = NEW_TOKENS) -> dict[str, object]:
        """One row."""
        if workload == "W7":
            return self._run_cold()
        start = time.perf_counter()
        if workload == "W6":
            asked = [self._ask("mixtures", start, prompt_of(i), new_tokens, raw=False) for i in range(8)]
        else:
            asked = [
                self._ask("adapters", start, self._prompts[i], new_tokens, adapter=adapter)
                for i, adapter in enumerate(PLAIN[workload])
            ]
        for each in asked:
            each.wait()
        return self._row(asked, time.perf_counter() - start)

    def tokens(self, workload: str, only: int | None = None) -> list[list[int]]:
        """The greedy tokens of a workload's sequences, together, or of one of them alone."""
        start = time.perf_counter()
        wanted = [i for i in range(len(PLAIN[workload])) if only is None or i == only]
        asked = [self._ask("adapters", start, self._prompts[i], NEW_TOKENS, adapter=PLAIN[workload][i]) for i in wanted]
        for each in asked:
            each.wait()
        return [each.tokens for each in asked]

    def _run_cold(self) -> dict[str, object]:
        """Poisson arrivals of 32 requests of mixed lengths, 20 a second; no expert is in memory at first."""
        chance = random.Random(0)
        self._engines.pop("mixtures", self._engine("mixtures")).close()
        self._engine("mixtures")
        start, asked = time.perf_counter(), []
        for i in range(32):
            asked.append(
                self._ask("mixtures", time.perf_counter(), prompt_of(i % 8), chance.randint(16, 64), raw=False)
            )
            time.sleep(chance.expovariate(20))
        for each in asked:
            each.wait()
        return self._row(asked, time.perf_counter() - start)

    def _ask(
        self, engine: str, start: float, text: str, new_tokens: int, *, adapter: int | None = None, raw: bool = True
    ) -> Asked:
        self._count += 1
        asked = Asked(start)
        request = Request(
            request_id=f"r{self._count}",
            text=text,
            raw=raw,
            task=f"a{adapter}" if adapter is not None else None,
            base_only=raw and adapter is None,
            sampling=SamplingParams(max_tokens=new_tokens, ignore_eos=True),
        )
        self._engine(engine).submit(request, asked.sink)
        return asked

    @staticmethod
    def _row(asked: list[Asked], wall_s: float) -> dict[str, object]:
        return {
            "tokens_per_s": sum(len(each.times) for each in asked) / wall_s,
            "ttft_s": statistics.mean(each.times[0] for each in asked),
            "tpot_s": statistics.mean((each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in asked),
            "peak_rss_mb": peak_mb(),
        }

    def profile(self, workload: str) -> dict[str, float]:
        """Milliseconds of each phase of the native step per new token of the batch, prompts left out."""
        if not isinstance(self._model, NativeLlama):
            raise SystemExit("only the native step tells its phases")
        step = self._model.step
        found = []
        for new_tokens in (2, NEW_TOKENS):
            step.phases()
            self.run(workload, new_tokens)
            found.append(step.phases())
        return {name: 1e3 * (found[1][name] - found[0][name]) / (NEW_TOKENS - 2) for name in found[0]}

    def close(self) -> None:
        """Stop."""
        for engine in self._engines.values():
            engine.close()


def prepare(folder: Path) -> None:
    """Make the repertoires that are missing."""
    missing = [name for name in ("adapters", "mixtures") if Repertoire(folder / name).head() is None]
    if not missing:
        return
    base = open_base("smollm2", cache=cache_folder()).load(dtype=torch.float32, device=torch.device("cpu"))
    if "adapters" in missing:
        _adopt_all(base, folder)
    if "mixtures" in missing:
        make_repertoire(folder / "mixtures", base, 8, rank=8, locate=True, see_all=True)


def _adopt_all(base: BaseModel, folder: Path) -> None:
    """Random PEFT adapters a0..a15 on all seven linears, unless they are there, and a repertoire of them."""
    from peft import LoraConfig, get_peft_model

    from runtime.model.generation import base_ref
    from training.adopt import adopt
    from training.peft_adapter import read_adapter

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    repertoire = Repertoire(folder / "adapters")
    for i in range(NUM_ADAPTERS):
        place = folder / "peft" / f"a{i}"
        if not (place / "adapter_config.json").is_file():
            torch.manual_seed(8000 + i)
            config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=targets)
            model = get_peft_model(base.model, config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(place)
            model.unload()
        adopt(repertoire, base, read_adapter(place, base_ref(base.info)), name=f"a{i}", samples=())


def main() -> None:
    """Answer lines until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--step", default="native")
    parser.add_argument("--folder", type=Path, default=Path("build/engine"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prepare", action="store_true", help="make the repertoires that are missing, and end")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.folder)
        return
    # In a process of its own, so that its memory does not count for that of the engine.
    here = [sys.executable, __file__, "--prepare", "--folder", str(options.folder)]
    subprocess.run(here, check=True, stdout=sys.stderr)
    bench = Bench(options.weights, options.step, options.folder, options.threads)
    print(json.dumps({"start_s": round(bench.start_s, 2)}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "tokens":
            together = bench.tokens(words[1])
            alone = [bench.tokens(words[1], only=i)[0] for i in range(len(together))]
            print(json.dumps({"together": together, "alone": alone}), flush=True)
        elif words[0] == "profile":
            print(json.dumps(bench.profile(words[1])), flush=True)
        elif words[0] == "warm":
            bench.run(words[1], 8)
            print("{}", flush=True)
        else:
            print(json.dumps(bench.run(words[0])), flush=True)
    bench.close()


if __name__ == "__main__":
    main()
