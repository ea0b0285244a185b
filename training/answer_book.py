"""Answers that were given, so that none is computed twice: by who answers and what is asked.

It does not know how answers are scored.
Read first: who answers is identified by the bits of its outputs (`training.answers.fingerprint`), not by its name. So a
task that a later stage left as it was keeps its answers, and one that moved is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel
from training.answers import fingerprint, greedy_answers
from training.subject import Subject


class AnswerBook:
    """Answers on disk, one file per (who, task), written after every call.

    Args:
        base: answers with what is attached to it.
        folder: of the files; must belong to one set of questions.
    """

    def __init__(self, base: BaseModel, folder: Path) -> None:
        self.base, self._folder = base, folder
        folder.mkdir(parents=True, exist_ok=True)

    def identify(self, ffns: Mapping[int, MixtureFFN], subject: Subject) -> str:
        """Fingerprint of the base with `ffns` on the first prompts of a task."""
        with attached(self.base.model, ffns):
            return fingerprint(self.base, subject.prompts)

    def answers(
        self, who: str, ffns: Mapping[int, MixtureFFN], subject: Subject, chosen: Sequence[int] | None = None
    ) -> list[str]:
        """Answers of the base with `ffns` to questions of a task.

        Args:
            who: what `identify` says of `ffns` on some task; equal for equal answers.
            ffns: layer -> mixture.
            subject: the task.
            chosen: places of the questions; None asks all.
        """
        wanted = range(len(subject.questions)) if chosen is None else chosen
        path = self._folder / f"{who[:24]}-{subject.name}.json"
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing = [i for i in wanted if str(i) not in known]
        if missing:
            with attached(self.base.model, ffns):
                given = greedy_answers(self.base, [subject.questions[i] for i in missing])
            known |= {str(i): answer for i, answer in zip(missing, given, strict=True)}
            write_json(path, known)
        return [known[str(i)] for i in wanted]


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
