"""Routers of every kind on a real base, exported and verified: the key `kinds` of benchmarks/results/export.json.

To a copy of a repertoire with trained experts it adds a task per kind of router over those experts, and one with
experts of attention. All are exported as `onnx-router` and in one `onnx-model`, which verify themselves; then the file
and the engine answer the same prompt with 64 greedy tokens.
Read first: the new routers are random but for Arrow's, so answers are nonsense; what is compared is arithmetic.

    python benchmarks/export_kinds.py --repertoire build/demo/repertoire
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from exporters.mixture_inputs import mixture_inputs
from exporters.model_session import ModelSession
from exporters.options import Options
from exporters.targets import export
from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams, TokenDelta
from runtime.engine.step_model import make_step_model
from runtime.model.attach import fresh_expert
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.expert import pack_expert_set
from runtime.model.generation import base_ref, open_generation
from runtime.model.hyper import HyperSizes, hyper_shapes
from runtime.model.hyper_sets import full_table
from runtime.model.manifest import TARGETS, HyperRef, Task
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Grouping, RouterRef
from runtime.model.routers import router_tensor_name
from training.arrow import arrow_routers

RESULTS = Path(__file__).parent / "results" / "export.json"
PROMPT = "Please cancel the two lamps that I ordered on the 3rd of May."
NUM_TOKENS = 64
PLAIN = {"scope": "token", "within": "input", "tau_group": 0.7, "tau_expert": 1.5, "epsilon": 0.0, "share": 1.0}
GROUPED: Mapping[str, Mapping[str, Any]] = {
    "grouped": {"epsilon": 0.1},
    "grouped-static": {"within": "static"},
    "grouped-general": {"share": 0.7},
    "grouped-request": {"scope": "request", "tau_group": 0.3},
}
HYPER = {"hyper-network": 2, "hyper-table": 1}
"""Name -> experts per token."""


@dataclass
class Shelf:
    """Blobs of the tasks to add, and where randomness comes from."""

    blobs: dict[str, bytes]
    generator: torch.Generator

    def put(self, tensors: dict[str, torch.Tensor]) -> str:
        """Add a blob; its digest."""
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def rows(self, count: int, width: int) -> torch.Tensor:
        """Random rows whose scores differ by about 1 for an input of root mean square 1."""
        return torch.randn(count, width, generator=self.generator) / width**0.5


def add_kinds(repertoire: Repertoire, base: BaseModel) -> tuple[str, ...]:
    """Publish a generation with a task of every kind, and say their names."""
    manifest, ref = repertoire.manifest(), base_ref(base.info)
    shelf = Shelf({}, torch.Generator().manual_seed(0))
    like = manifest.tasks[-1]
    visible = like.router.visible
    counts = {layer: len(found) for layer, found in manifest.visible_layers(like).items()}
    width = ref.width

    def task(name: str, **fields: object) -> Task:
        return like.model_copy(update={"name": name, "experts": None, **fields})

    def router(kind: str, digest: str, top_k: int, **fields: object) -> RouterRef:
        given = {"kind": kind, "digest": digest, "top_k": top_k, "visible": visible, **fields}
        return RouterRef.model_validate(given)

    scores = {router_tensor_name(layer): shelf.rows(count, width) for layer, count in counts.items()}
    plain = shelf.put(scores)
    experts = {
        digest: {
            unit.layer: repertoire.read_unit(manifest.expert_set(digest), unit, manifest.base)
            for unit in manifest.expert_set(digest).units
        }
        for digest in visible
    }
    arrows = {router_tensor_name(layer): rows for layer, rows in arrow_routers(experts, width).items()}
    tasks = [task("top-k", router=router("top_k", plain, 2))]
    tasks.append(task("arrow", router=router("arrow", shelf.put(arrows), 2)))
    for name, fields in GROUPED.items():
        general = visible[0] if "share" in fields else None
        seen = tuple(digest for digest in visible if digest != general)
        groups = tuple("ab"[i % 2] for i in range(len(seen)))
        grouping = Grouping(**{**PLAIN, **fields, "groups": groups, "general": general})
        tensors = {}
        for layer in counts:
            here = sum(unit.layer == layer for digest in seen for unit in manifest.expert_set(digest).units)
            if grouping.within == "static":
                tensors[router_tensor_name(layer, "logits")] = torch.randn(here, generator=shelf.generator)
            else:
                tensors[router_tensor_name(layer)] = shelf.rows(here, width)
            names = len(grouping.names())
            tensors[router_tensor_name(layer, "group.weight")] = shelf.rows(names, width)
            tensors[router_tensor_name(layer, "group.bias")] = torch.randn(names, generator=shelf.generator)
        ref_of = router("grouped", shelf.put(tensors), len(seen), visible=seen, grouping=grouping)
        tasks.append(task(name, router=ref_of))
    for name, top_k in HYPER.items():
        sizes = HyperSizes(width=width, bottleneck=16, factor=4, experts=counts)
        weights = {
            part: torch.randn(shape, generator=shelf.generator) * 0.3 * shape[-1] ** -0.5
            for part, shape in hyper_shapes(sizes).items()
        }
        kind = name.removeprefix("hyper-")
        digest = shelf.put(weights if kind == "network" else full_table(weights, sizes))
        hyper = HyperRef(kind=kind, digest=digest, bottleneck=16, factor=4)  # type: ignore[arg-type]
        tasks.append(task(name, router=router("top_k", plain, top_k), hyper=hyper))
    fresh = {}
    for layer in counts:
        made = fresh_expert(layer, rank=4, alpha=8.0, base=ref, generator=shelf.generator, targets=TARGETS)
        for update in made.updates.values():
            update.b.normal_(std=0.02, generator=shelf.generator)
        fresh[layer] = made
    data, entry = pack_expert_set(fresh, task="attention", dtype="bfloat16", base=ref)
    shelf.blobs[entry.digest] = data
    seen = (*visible, entry.digest)
    wider = shelf.put({router_tensor_name(layer): shelf.rows(count + 1, width) for layer, count in counts.items()})
    tasks.append(task("attention", experts=entry.digest, router=router("top_k", wider, 2, visible=seen)))
    published = manifest.model_copy(
        update={
            "generation": manifest.generation + 1,
            "parent": manifest.generation,
            "base": ref,
            "experts": (*manifest.experts, entry),
            "tasks": (*manifest.tasks, *tasks),
        }
    )
    repertoire.publish(published, shelf.blobs, expected=manifest.generation)
    return tuple(one.name for one in tasks)


def engine_tokens(engine: Engine, task: str) -> list[int]:
    """What the engine answers, greedily."""
    events: list[Event] = []
    ended = threading.Event()

    def sink(event: Event) -> None:
        events.append(event)
        if isinstance(event, Finished | Failed):
            ended.set()

    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.submit(Request(request_id=task, text=PROMPT, sampling=params, task=task), sink)
    if not ended.wait(120) or isinstance(events[-1], Failed):
        raise SystemExit(f"{task}: {events[-1] if events else 'no answer'}")
    return [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]


def file_tokens(path: Path, repertoire: Repertoire, base: BaseModel, task: str) -> list[int]:
    """What the exported file answers, greedily."""
    generation = open_generation(repertoire)
    ids = torch.tensor([generation.template.encode(base.tokenizer, PROMPT)])
    session = ModelSession(path, mixture_inputs(repertoire, generation, [None]))
    entering = session.entering(ids) if generation.mixture(task).by_request else None
    session.start(mixture_inputs(repertoire, generation, [task], entering=entering))
    tokens: list[int] = session.answer(ids, NUM_TOKENS)[0].tolist()
    return tokens


def main() -> None:
    """Measure, print, and merge into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repertoire", type=Path, required=True, help="with trained experts; it is copied")
    parser.add_argument("--base", default="smollm2", help="its base, by name or path")
    arguments = parser.parse_args()
    folder = resolve_base(arguments.base, cache=cache_folder())
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as place:
        ignored = shutil.ignore_patterns("exports")
        copy = Repertoire(shutil.copytree(arguments.repertoire, Path(place) / "copy", ignore=ignored))
        base = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
        names = add_kinds(copy, base)
        routers = export(copy, "onnx-router")
        print(json.dumps({"router skipped": dict(routers.manifest.skipped)}), flush=True)
        model = export(copy, "onnx-model", options=Options(base=folder))
        (whole, _) = model.manifest.files
        print(json.dumps({"model": [vars(check) for check in whole.checks]}, default=list), flush=True)
        step = make_step_model(
            base.model, max_context=256, weights="float32", step="auto", folder=cache_folder(), threads=1
        )
        engine = Engine(
            step,
            base.tokenizer,
            base.eos_token_ids,
            repertoire=copy,
            generation=open_generation(copy),
            options=EngineOptions(max_context=256),
        )
        engine.start()
        answers = set()
        for name in names:
            wanted = engine_tokens(engine, name)
            answers.add(tuple(wanted))
            file = next((file for file in routers.manifest.files if file.name == f"{name}.onnx"), None)
            rows[name] = {
                "router": None if file is None else {"max_error": max(check.max_error for check in file.checks)},
                "model_tokens_equal_the_engines": file_tokens(model.folder / whole.name, copy, base, name) == wanted,
            }
            print(json.dumps({name: rows[name]}), flush=True)
        engine.close()
        checks = {check.output: check.max_error for check in whole.checks}
    made = {"command": f"python benchmarks/export_kinds.py --repertoire DIR --base {folder.name}"}
    made["workload"] = f"one prompt, {NUM_TOKENS} greedy tokens per kind, {len(answers)} different answers"
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    results |= {"kinds": rows, "kinds_model": checks, "kinds_made_by": made}
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"kinds in {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
