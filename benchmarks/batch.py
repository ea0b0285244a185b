"""Offline batch, measured: the same rows against PEFT adapters swapped one task at a time, kills, and Ray.

It prints JSON and writes benchmarks/results/batch.json; the ratio is of two speeds taken in one run.
Read first: run it on a quiet machine; it takes some minutes. `--data` holds one folder per task with `test.jsonl` and
`train.jsonl` (`input`, `output`). With `--repertoire`, whose tasks have the names of those folders, rows are located,
as they would be in use. Without, a repertoire of synthetic experts of rank 8 is made, and each row pins its task:
bytes, reads and arithmetic are those of trained experts, the answers are nonsense. Either side makes exactly
`--max-tokens` tokens of every row, greedily, with as many threads; `transformers.generate` gets rows sorted by length,
in float32. It is slow, so the two speeds are taken on the same `--peft-rows` rows; all else is about all rows.

    python benchmarks/batch.py --data FOLDER --repertoire REPERTOIRE
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import peft
import torch
from synthetic import make_repertoire, name_of

from exporters.options import Options
from exporters.targets import export
from greenroom.cli.places import cache_folder
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire

RESULTS = Path(__file__).parent / "results" / "batch.json"
RANK = 8


def read_rows(data: Path, tasks: list[str], total: int, longest: int) -> list[dict[str, str]]:
    """`total` rows of at most `longest` characters, as many of each task as of the next, the tasks taking turns."""
    share = -(-total // len(tasks))
    columns = []
    for task in tasks:
        rows: list[dict[str, str]] = []
        for name in ("test.jsonl", "train.jsonl"):
            with (data / task / name).open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    text = json.loads(line)["input"]
                    if len(rows) < share and text.strip() and len(text) <= longest:
                        rows.append({"input": text, "wanted_task": task})
        if len(rows) < share:
            sys.exit(f"{task}: {len(rows)} usable rows, {share} are needed; name others in --tasks")
        columns.append(rows)
    return [row for rows in zip(*columns, strict=True) for row in rows][:total]


def batch_command(arguments: argparse.Namespace, source: Path, target: Path, *more: str) -> list[str]:
    """The command that a user would type."""
    flags = ["--repertoire", str(arguments.repertoire), "--base", arguments.base, "--threads", str(arguments.threads)]
    flags += ["--max-tokens", str(arguments.max_tokens), "--max-running", str(arguments.batch_size), "--ignore-eos"]
    flags += ["--shard-rows", str(arguments.shard_rows), "--dtype", arguments.dtype]
    return [sys.executable, "-m", "greenroom.cli.main", "batch", str(source), str(target), *flags, *more]


def run(what: str, command: list[str]) -> None:
    """Run to the end; it must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"{what}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def write_rows(path: Path, rows: list[dict[str, str]], names: dict[str, str], *, pinned: bool) -> Path:
    """Rows as a user would give them."""
    lines = [{**row, "task": names[row["wanted_task"]]} if pinned else row for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def killed_at(command: list[str], target: Path, pieces: int) -> None:
    """Run until so many shards are answered, then kill -9."""
    work = target.with_name(target.name + ".work")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list(work.glob("answers-*.json"))) < pieces:
            if process.poll() is not None:
                sys.exit(f"the run ended before {pieces} shards were answered; take fewer --shard-rows")
            time.sleep(0.05)
        process.kill()


def seconds_of(target: Path) -> float:
    """What a run took to answer, without loading the base."""
    report = json.loads(target.with_name(f"{target.name}.report.json").read_text())
    return float(report["locating_s"] + report["answering_s"])


def swapping_peft(
    base: BaseModel,
    template: PromptTemplate,
    adapters: dict[str, Path],
    rows: list[dict[str, str]],
    *,
    width: int,
    new: int,
) -> float:
    """Seconds to answer all rows with one adapter after the other, loading included."""
    tokenizer = base.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else base.eos_token_ids[0]
    started = time.perf_counter()
    model: Any = base.model
    for task, folder in adapters.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
        prompts = sorted(
            (template.encode(tokenizer, row["input"]) for row in rows if row["wanted_task"] == task), key=len
        )
        for begin in range(0, len(prompts), width):
            part = prompts[begin : begin + width]
            longest = max(map(len, part))
            ids = torch.tensor([[pad] * (longest - len(one)) + one for one in part])
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in part])
            with torch.inference_mode():
                adapted.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=pad,
                )
        model = adapted.unload()
    return time.perf_counter() - started


def options() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repertoire", type=Path)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--tasks", help="names of folders in --data, by default all in alphabetical order")
    parser.add_argument("--rows", type=int, default=2100)
    parser.add_argument("--peft-rows", type=int, default=210)
    parser.add_argument("--longest", type=int, default=160, help="characters of an input; others are passed over")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="the base's weights in Greenroom")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build") / "batch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    arguments = options()
    torch.set_num_threads(arguments.threads)
    tasks = (
        arguments.tasks.split(",")
        if arguments.tasks
        else sorted(p.name for p in arguments.data.iterdir() if p.is_dir())
    )
    rows = read_rows(arguments.data, tasks, arguments.rows, arguments.longest)
    shutil.rmtree(arguments.work / "runs", ignore_errors=True)
    (arguments.work / "runs").mkdir(parents=True)
    folder = resolve_base(arguments.base, cache=cache_folder())
    base = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    synthetic = arguments.repertoire is None
    if synthetic:
        arguments.repertoire = arguments.work / f"synthetic-{len(tasks)}"
        make_repertoire(arguments.repertoire, base, len(tasks), rank=RANK, locate=False)
    names = {task: name_of(i) if synthetic else task for i, task in enumerate(tasks)}
    repertoire = Repertoire(arguments.repertoire)
    template = PromptTemplate.parse(repertoire.manifest().prompt_template)
    runs = arguments.work / "runs"
    source = write_rows(runs / "rows.jsonl", rows, names, pinned=synthetic)
    sample = rows[: arguments.peft_rows]
    sampled = write_rows(runs / "sample.jsonl", sample, names, pinned=synthetic)
    adapters = {
        task: export(repertoire, "peft", options=Options(base=folder, task=name, weights="only-own")).folder
        for task, name in names.items()
    }
    whole, resumed, on_ray, answered = (runs / f"{name}.jsonl" for name in ("whole", "resumed", "ray", "answered"))
    run("the same rows as PEFT", batch_command(arguments, sampled, answered))
    ours_s = seconds_of(answered)
    width, new = arguments.batch_size, arguments.max_tokens
    peft_s = swapping_peft(base, template, adapters, sample, width=width, new=new)
    print(f"PEFT: {peft_s:.0f} s", file=sys.stderr, flush=True)
    run("all rows", batch_command(arguments, source, whole))
    report = json.loads(whole.with_name("whole.jsonl.report.json").read_text())
    for part in (1, 2, 3):
        killed_at(batch_command(arguments, source, resumed), resumed, report["shards"] * part // 4)
    run("the last of four parts", batch_command(arguments, source, resumed))
    shared = ("--ray", "--ray-workers", "2", "--threads", str(max(1, arguments.threads // 2)))
    run("two workers, who share the threads", batch_command(arguments, source, on_ray, *shared))
    result = {
        "rows": report["answered"],
        "tasks": len(report["tasks"]),
        "throughput_over_peft_swap": round(peft_s / ours_s, 3),
        "throughput_rows": len(sample),
        "dtype": arguments.dtype,
        "loads_per_task": round(report["loads_per_expert"], 3),
        "resume_identical": resumed.read_bytes() == whole.read_bytes(),
        "ray_identical": on_ray.read_bytes() == whole.read_bytes(),
    }
    facts = {"seconds": round(ours_s, 2), "peft_seconds": round(peft_s, 2), "whole_seconds": seconds_of(whole)}
    print(json.dumps({**result, **facts, "experts": "synthetic" if synthetic else "of the repertoire"}))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
