"""Those who learn tasks in sequence: one shared adapter, or a repertoire that grows.

They do not know scores.
Read first: `learn` is called once per stage, in order, and returns at once where the stage's result lies on disk, so
that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from runtime.model.attach import MixtureFFN, load_mixture
from runtime.model.base import BaseModel
from runtime.model.expert import unit_tensors
from runtime.model.generation import Generation, base_ref, open_generation
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.features import features
from training.grow import add_task
from training.shared_adapter import DENSE_EXPERTS, SharedAdapter
from training.subject import Subject

SHARED = {"sequential_lora": 1, "moelora": DENSE_EXPERTS}
"""Name -> experts per layer."""
GROWING = ("per_task", "everywhere", "pgke")
"""Own expert only; shared experts with a new one in every layer; shared experts with a new one where probing asks."""

REPORTS = "reports"
"""Folder, beside a growing contender's repertoire, of `training.report`'s reports."""


class Contender(Protocol):
    """Learns stage after stage."""

    promises: bool
    """Whether old outputs stay bit for bit what they were."""

    def learn(self, stage: int, subject: Subject) -> None:
        """Learn one more task; `stage` counts from 0."""
        ...

    def ffns(self, task: str) -> Mapping[int, MixtureFFN]:
        """What answers prompts of a task, as of the last stage that was learned."""
        ...

    def num_parameters(self, *, locating: bool) -> int:
        """Parameters trained so far, with or without those that locate."""
        ...


class SharedContender:
    """A `SharedAdapter`, its state kept per stage in `folder`."""

    promises = False

    def __init__(self, base: BaseModel, name: str, folder: Path, *, first_layer: int, config: TrainingConfig) -> None:
        self._folder = folder
        self._adapter = SharedAdapter(base, name=name, num_experts=SHARED[name], first_layer=first_layer, config=config)

    def learn(self, stage: int, subject: Subject) -> None:
        """See `Contender`."""
        path = self._folder / f"state-{stage}.safetensors"
        if not path.exists():
            if stage:
                self._adapter.load(self._folder / f"state-{stage - 1}.safetensors")
            self._adapter.learn(subject.name, subject.rows)
            self._adapter.save(path)
        self._adapter.load(path)

    def ffns(self, task: str) -> Mapping[int, MixtureFFN]:  # noqa: ARG002 - all tasks share it
        """See `Contender`."""
        return self._adapter.ffns

    def num_parameters(self, *, locating: bool) -> int:  # noqa: ARG002
        """See `Contender`."""
        return self._adapter.num_parameters


class GrowingContender:
    """A repertoire in `folder`; its generation `stage + 1` is what was learned by then."""

    promises = True

    def __init__(self, base: BaseModel, name: str, folder: Path, *, first_layer: int, config: TrainingConfig) -> None:
        self._base, self._folder = base, folder
        self._repertoire = Repertoire(folder / "repertoire")
        self._config = replace(
            config,
            first_layer=first_layer,
            visible="own" if name == "per_task" else "all",
            expansion=config.expansion if name == "pgke" else "everywhere",
        )
        self._opened: Generation

    def learn(self, stage: int, subject: Subject) -> None:
        """See `Contender`."""
        if (self._repertoire.head() or 0) <= stage:
            reports = self._folder / REPORTS / subject.name
            add_task(self._repertoire, self._base, subject.data, self._config, report_folder=reports)
        self._opened = open_generation(self._repertoire, stage + 1)

    def ffns(self, task: str) -> Mapping[int, MixtureFFN]:
        """See `Contender`."""
        return load_mixture(self._repertoire, self._opened, task, self._base.model)

    def locate(self, prompts: Sequence[Sequence[int]]) -> list[str | None]:
        """The task of every prompt, None for no task."""
        ref = self._opened.manifest.locator
        found = features(self._base, prompts, ref.layer, kind=ref.feature)
        return [decision.task for decision in self._opened.locator.locate(found)]

    def num_parameters(self, *, locating: bool) -> int:
        """See `Contender`."""
        manifest = self._opened.manifest
        if locating:
            return sum(task.trained_parameters for task in manifest.tasks)
        ref = base_ref(self._base.info)
        units = [unit_tensors(unit.ranks, ref, entry.layout) for entry in manifest.experts for unit in entry.units]
        routers = [router.weight for mixture in self._opened.mixtures.values() for router in mixture.routers.values()]
        experts = sum(rows * columns for shapes in units for rows, columns in shapes.values())
        return experts + sum(torch.numel(weight) for weight in routers)


def contender(name: str, base: BaseModel, folder: Path, *, first_layer: int, config: TrainingConfig) -> Contender:
    """The contender of this name, a key of `SHARED` or a member of `GROWING`; what it keeps lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = SharedContender if name in SHARED else GrowingContender
    return made(base, name, folder, first_layer=first_layer, config=config)
