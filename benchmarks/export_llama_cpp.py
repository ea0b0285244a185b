"""Target `gguf-lora` in llama.cpp itself: its server answers with the adapter, and must write what torch writes.

It knows nothing of how adapters are made. Nothing of llama.cpp comes with this project: build it and convert the base
(`convert_hf_to_gguf.py BASE --outfile base.gguf`) first.
Read first: the server gets token ids and decodes greedily; torch answers with the same fixed mixture, its experts
attached to the base as they are stored. An answer counts up to the first token at which torch's two best logits are
nearer than the dtypes of the two sides are exact.

    python benchmarks/export_llama_cpp.py --repertoire DIR --server llama-server --gguf base.gguf --weights a=1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from exporters.constant_mixture import attached_mixture, read_mixture
from exporters.model_quality import TEXTS, greedy_answer
from exporters.options import Options, Source
from exporters.targets import export
from greenroom.cli.places import cache_folder
from runtime.model.base import load_base, resolve_base
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire

RESULTS = Path(__file__).parent / "results" / "export.json"
NUM_TOKENS = 32
NEAR = 0.1
"""Two logits nearer than this may change places: llama.cpp computes with bfloat16 weights and rounded inputs."""


@contextmanager
def server(program: Path, gguf: Path, port: int, adapter: Path | None) -> Iterator[str]:
    """A llama-server on loopback; yields its address."""
    command = [str(program), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-np", "1"]
    command += ["-c", "256", *(["--lora", str(adapter)] if adapter else [])]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read().decode(errors="replace")[-2000:])
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=2):
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def ask(address: str, ids: list[int]) -> list[int]:
    """Greedy tokens of the server behind a prompt."""
    body = {"prompt": ids, "n_predict": NUM_TOKENS, "temperature": 0, "top_k": 1, "samplers": ["top_k"]}
    body |= {"cache_prompt": False, "return_tokens": True}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


def agreed(got: list[int], tokens: list[int], logits: torch.Tensor) -> tuple[int, bool]:
    """How many tokens are equal from the first on, and whether the next one, if any, is a near tie of torch's."""
    equal = next((i for i, (one, other) in enumerate(zip(got, tokens, strict=False)) if one != other), None)
    if equal is None and len(got) == len(tokens):
        return len(got), True
    place = min(len(got), len(tokens)) if equal is None else equal
    best = logits[place].topk(2).values
    return place, float(best[0] - best[1]) < NEAR


def until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """At most `NUM_TOKENS` tokens, up to the end token."""
    end = next((i for i, token in enumerate(tokens) if token in ends), NUM_TOKENS)
    return tokens[: min(end, NUM_TOKENS)]


def main() -> None:
    """Compare, print, and merge into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repertoire", type=Path, required=True)
    parser.add_argument("--base", default="smollm2", help="its base, by name or path")
    parser.add_argument("--server", type=Path, required=True, help="the program llama-server")
    parser.add_argument("--gguf", type=Path, required=True, help="the base, converted")
    parser.add_argument("--weights", required=True, help="fixed weights, such as red=0.7,blue=0.3")
    parser.add_argument("--answers", type=int, default=len(TEXTS), help="how many prompts are answered")
    parser.add_argument("--port", type=int, default=18765)
    arguments = parser.parse_args()
    folder = resolve_base(arguments.base, cache=cache_folder())
    options = Options(base=folder, weights=arguments.weights)
    with tempfile.TemporaryDirectory() as place:
        ignored = shutil.ignore_patterns("exports")
        copy = Repertoire(shutil.copytree(arguments.repertoire, Path(place) / "copy", ignore=ignored))
        adapter = export(copy, "gguf-lora", options=options).folder / "adapter.gguf"
        generation = open_generation(copy)
        base = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
        texts = TEXTS[: arguments.answers]
        prompts = [torch.tensor(generation.template.encode(base.tokenizer, text)) for text in texts]
        _, mixture = read_mixture(Source(repertoire=copy, generation=generation, options=options))
        with attached_mixture(base.model, mixture):
            wanted = [greedy_answer(base.model, ids) for ids in prompts]
        plain = [until_end(greedy_answer(base.model, ids)[0].tolist(), base.eos_token_ids) for ids in prompts[:2]]
        with server(arguments.server, arguments.gguf, arguments.port, adapter) as address:
            answers = [ask(address, ids.tolist()) for ids in prompts]
    rows = []
    for got, (tokens, logits) in zip(answers, wanted, strict=True):
        own = until_end(got, base.eos_token_ids)
        equal, is_fair = agreed(own, until_end(tokens.tolist(), base.eos_token_ids), logits)
        rows.append({"tokens": len(own), "equal": equal, "fair": is_fair})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "answers": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "equal": sum(row["equal"] == row["tokens"] for row in rows),
        "differ_where_torch_is_within": NEAR,
        "verified": all(row["fair"] for row in rows),
        "differs_from_the_plain_base": any(
            one != until_end(got, base.eos_token_ids) for one, got in zip(plain, answers[:2], strict=True)
        ),
        "weights": arguments.weights,
        "command": "python benchmarks/export_llama_cpp.py --repertoire DIR --server llama-server --gguf base.gguf "
        f"--weights {arguments.weights}",
    }
    print(json.dumps(result))
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps(results | {"llama_cpp": result}, indent=1) + "\n", encoding="utf-8")
    print(f"llama_cpp in {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
