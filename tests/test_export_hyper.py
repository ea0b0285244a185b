"""Hyper-adapters in `onnx-model`: fed per set of experts, verified, and refused by name where there are too many sets.

Read first: an adapter depends on the set of experts that a token chose; the engine makes it, the file gets it fed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import ask
from exports import files_below
from hyper_tasks import lively, with_hyper
from repertoires import Workshop
from safetensors.torch import save

from exporters.hyper_inputs import hyper_refusal
from exporters.mixture_inputs import mixture_inputs
from exporters.model_session import ModelSession
from exporters.onnx_model import answered
from exporters.options import Options
from exporters.targets import export
from runtime.engine.engine import Engine
from runtime.errors import InvalidInputError
from runtime.model.generation import open_generation
from runtime.model.hyper import HyperSizes
from runtime.model.hyper_sets import Hyper
from runtime.model.manifest import HyperRef
from runtime.model.mixture import Mixture

IDS = torch.tensor([[1, 40, 50, 60, 70]])


def test_a_model_graph_adds_the_hyper_adapters_of_the_set_that_a_token_chose(
    workshop: Workshop, tiny_base_folder: Path, make_engine: Callable[..., Engine]
) -> None:
    with_hyper(workshop, "network", top_k=2)
    workshop.publish("blue", "? ! ?")
    done = export(workshop.repertoire, "onnx-model", options=Options(base=tiny_base_folder))
    assert done.manifest.skipped == {}
    engine, generation = make_engine(workshop), open_generation(workshop.repertoire)
    ids = torch.tensor([generation.template.encode(workshop.base.tokenizer, "hello there")])
    session = ModelSession(done.folder / "model.onnx", mixture_inputs(workshop.repertoire, generation, [None]))
    written = {}
    for number, task in ((None, "green"), (None, "red"), (None, "blue"), (2, "green")):  # 2: green without adapters
        found = open_generation(workshop.repertoire, number)
        session.start(mixture_inputs(workshop.repertoire, found, [task]))
        written[number, task] = session.answer(ids, 64)[0].tolist()
        if number is None:
            assert written[number, task] == ask(engine, "hello there", max_tokens=64, task=task).wait().tokens
    assert written[None, "green"] != written[2, "green"]


def test_hyper_adapters_of_several_tasks_share_a_batch(workshop: Workshop, tiny_base_folder: Path) -> None:
    with_hyper(workshop, "table", top_k=1)
    workshop.publish("blue", "? ! ?", kind="arrow", top_k=2)
    manifest = workshop.repertoire.manifest()
    green, blue = manifest.tasks[1:]
    top_k = blue.router.model_copy(
        update={"kind": "top_k", "visible": green.router.visible, "digest": green.router.digest}
    )
    network = lively(HyperSizes(width=64, bottleneck=5, factor=2, experts={2: 2, 3: 2}), seed=3)
    blob = save(network)
    digest = hashlib.sha256(blob).hexdigest()
    ref = HyperRef(kind="network", digest=digest, bottleneck=5, factor=2)
    changed = blue.model_copy(update={"router": top_k, "hyper": ref})
    tasks = (*manifest.tasks[:2], changed)
    newest = manifest.model_copy(update={"generation": 5, "parent": 4, "tasks": tasks})
    workshop.repertoire.publish(newest, {**workshop.blobs, digest: blob}, expected=4)
    path = export(workshop.repertoire, "onnx-model", options=Options(base=tiny_base_folder)).folder / "model.onnx"
    generation, names = open_generation(workshop.repertoire), ("blue", None, "green", "red")
    packed = mixture_inputs(workshop.repertoire, generation, names)
    assert packed["hyper_sets"].shape == (2, 3 + 2, 2 + 2 + 1)  # blue's three sets of two experts, green's two of one
    assert packed["hyper_down"].shape == (2, 3 * 5 + 2 * 8, 64)
    ids = IDS.expand(4, -1)
    together = ModelSession(path, packed).step(ids, keep=5)
    for row, task in zip(together, names, strict=True):
        alone = ModelSession(path, mixture_inputs(workshop.repertoire, generation, [task])).step(IDS, keep=5)[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_hyper_adapters_are_fed_per_set_and_those_of_too_many_sets_are_refused(workshop: Workshop) -> None:
    with_hyper(workshop, "network", top_k=2)
    mixture = open_generation(workshop.repertoire).mixture("green")
    assert mixture.hyper is not None
    sizes = dataclasses.replace(mixture.hyper.sizes, experts={2: 2, 3: 15})
    fits = dataclasses.replace(mixture, hyper=dataclasses.replace(mixture.hyper, sizes=sizes))
    assert hyper_refusal(fits) is None
    assert hyper_refusal(dataclasses.replace(mixture, hyper=None)) is None
    wide = dataclasses.replace(sizes, experts={2: 2, 3: 16})
    larger = dataclasses.replace(mixture, hyper=dataclasses.replace(mixture.hyper, sizes=wide))
    assert hyper_refusal(larger) == (
        "its router can choose 136 sets of experts in a layer, and hyper-adapters have room for 128"
    )


def test_a_model_that_no_task_fits_is_refused(workshop: Workshop, tiny_base_folder: Path) -> None:
    with_hyper(workshop, "network", top_k=8)
    for number in range(6):
        workshop.publish(f"task-{number}", "word", layers=(3,))
    manifest = workshop.repertoire.manifest()
    green = manifest.tasks[1]
    wide = green.router.model_copy(
        update={"visible": manifest.tasks[-1].router.visible, "digest": manifest.tasks[-1].router.digest, "top_k": 4}
    )
    sizes = HyperSizes(width=64, bottleneck=8, factor=2, experts={2: 2, 3: 8})
    blob = save(lively(sizes))
    digest = hashlib.sha256(blob).hexdigest()
    assert green.hyper is not None
    changed = green.model_copy(
        update={
            "router": wide,
            "hyper": green.hyper.model_copy(update={"digest": digest}),
            "experts": manifest.experts[-1].digest,
        }
    )
    alone = manifest.model_copy(update={"generation": 10, "parent": 9, "tasks": (changed,)})
    workshop.repertoire.publish(alone, {**workshop.blobs, digest: blob}, expected=9)
    with pytest.raises(InvalidInputError, match="task='green': onnx-model cannot take it: its router can choose 162"):
        mixture_inputs(workshop.repertoire, open_generation(workshop.repertoire), ["green"])
    with pytest.raises(InvalidInputError, match="it can take none of the tasks green"):
        export(workshop.repertoire, "onnx-model", options=Options(base=tiny_base_folder))
    assert files_below(workshop.repertoire.root / "exports") == []


def test_verification_answers_the_newest_task_of_every_sort_beside_the_newest_of_all() -> None:
    plain = Mixture(task="", digest="", top_k=1, routers={})
    sorts = {
        "older-arrow": dataclasses.replace(plain, kind="arrow"),
        "arrow": dataclasses.replace(plain, kind="arrow"),
        "grouped": dataclasses.replace(plain, kind="grouped"),
        "request": dataclasses.replace(plain, kind="grouped", by_request=True),
        "hyper": dataclasses.replace(
            plain, hyper=Hyper("table", HyperSizes(width=1, bottleneck=1, factor=1, experts={}), {}, 1)
        ),
        **dict.fromkeys(("a", "b", "c", "d", "e"), plain),
    }
    assert answered(sorts) == ("arrow", "grouped", "request", "hyper", "b", "c", "d", "e")
