"""A locator alone, fitted anew to tasks whose experts are trained already.

It does not know experts, routers or scores.
Read first: it is a repertoire of tasks without experts, so that its locator is made, stored and read by the code that
serves. Stage `t` is its generation `t + 1`, as in a repertoire that grew with its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.model.base import BaseModel
from runtime.model.generation import Generation, open_generation
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.features import features
from training.publish import NewTask, publish_task, stand_on
from training.subject import Subject


class Relocation:
    """Densities of tasks, in the order of their arrival.

    Args:
        base: frozen.
        folder: keeps the densities; one that holds another's is not cleared.
        config: the fields `locator_*` and `first_layer`, and the seed.
    """

    def __init__(self, base: BaseModel, folder: Path, *, config: TrainingConfig) -> None:
        self._base, self._repertoire, self._config = base, Repertoire(folder), config
        self._opened: Generation

    def learn(self, stage: int, subject: Subject) -> None:
        """Fit one more task's density, unless the folder holds it; `stage` counts from 0."""
        if (self._repertoire.head() or 0) <= stage:
            ground = stand_on(self._repertoire, self._base, subject.name, self._config)
            task = NewTask(
                name=subject.name,
                prompts=[row.asked for row in subject.rows],
                experts=None,
                router={},
                kind="top_k",
                top_k=1,
                visible=(),
                trained_parameters=0,
            )
            publish_task(self._repertoire, self._base, ground, task, self._config)
        self._opened = open_generation(self._repertoire, stage + 1)

    def locate(self, prompts: Sequence[Sequence[int]]) -> list[str | None]:
        """The task of every prompt, None for no task, by the densities of the last stage that was learned."""
        ref = self._opened.manifest.locator
        found = features(self._base, prompts, ref.layer, kind=ref.feature)
        return [decision.task for decision in self._opened.locator.locate(found)]

    @property
    def num_parameters(self) -> int:
        """Numbers fitted so far."""
        return sum(task.trained_parameters for task in self._opened.manifest.tasks)
