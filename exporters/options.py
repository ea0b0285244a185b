"""What a caller may choose about an export beside its target, and how the choices become a folder's name.

It does not know what any target does with them; `exporters.targets` says which target takes which option.
Read first: an option that a target does not take is refused, never ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from exporters.artefact import sha256_of
from exporters.manifest import Facts
from exporters.opsets import IR_VERSIONS, OPSET
from runtime.errors import InvalidInputError
from runtime.model.generation import Generation
from runtime.model.repertoire import Repertoire

FLOAT32 = "float32"
PRECISIONS = (FLOAT32, "int8", "int4")
"""What weights of a whole model are stored in, the first by default."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of one export; None where nothing was chosen.

    Args:
        base: folder of the base model.
        task: whose mixture.
        weights: what takes the router's place, see `exporters.constant_mixture`.
        prompts: JSONL file of rows with an `input`, to measure agreement on.
        arch: the one GPU architecture to compile for, such as `sm_90`.
        dtype: what the compiled kernels compute in.
        precision: what a whole model's weights are stored in, one of `PRECISIONS`.
        opset: of a graph, a key of `IR_VERSIONS`.
    """

    base: Path | None = None
    task: str | None = None
    weights: str | None = None
    prompts: Path | None = None
    arch: str | None = None
    dtype: str | None = None
    precision: str | None = None
    opset: int | None = None

    def given(self) -> tuple[str, ...]:
        """Names of the options that were chosen."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def only(self, names: Iterable[str]) -> Options:
        """These options without those that are not in `names`."""
        return Options(**{name: getattr(self, name) for name in names})

    def check(self, target: str, *, required: frozenset[str], optional: frozenset[str]) -> None:
        """Check that a target can use exactly what was chosen.

        Raises:
            InvalidInputError: an option is missing, or one too many, or no precision or opset.
        """
        if self.precision not in (None, *PRECISIONS):
            raise InvalidInputError("precision", self.precision, f"must be one of {', '.join(PRECISIONS)}")
        if self.opset not in (None, *IR_VERSIONS):
            raise InvalidInputError("opset", self.opset, f"must be one of {', '.join(map(str, IR_VERSIONS))}")
        for name in sorted(required.difference(self.given())):
            raise InvalidInputError(name, None, f"target {target} needs it")
        for name in self.given():
            if name not in required | optional:
                raise InvalidInputError(name, str(getattr(self, name)), f"target {target} does not take it")

    def facts(self) -> Facts:
        """What of the choices decides the artefact; the base is not among them, the generation names it."""
        names = ("task", "weights", "arch", "dtype")
        chosen: Facts = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.prompts is not None:
            chosen["prompts_sha256"] = sha256_of(self.prompts)
        if self.precision not in (None, FLOAT32):
            chosen["precision"] = self.precision
        if self.chosen_opset() != OPSET:
            chosen["opset"] = self.opset
        return chosen

    def chosen_opset(self) -> int:
        """The opset, also where none was given."""
        return self.opset or OPSET

    def folder_name(self, target: str) -> str:
        """One folder per mixture, precision and opset.

        `target`, `target.task`, with weights `target.` and 12 digits of their SHA-256, or `target.precision`; behind it
        `.opset` and its number, unless it is the default.
        """
        opset = "" if self.chosen_opset() == OPSET else f".opset{self.opset}"
        return self._folder_name(target) + opset

    def _folder_name(self, target: str) -> str:
        if self.precision not in (None, FLOAT32):
            return f"{target}.{self.precision}"
        if self.weights is not None:
            text = f"{self.task or ''}\n{self.weights}"
            return f"{target}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return f"{target}.{self.task}" if self.task is not None else target


NO_OPTIONS = Options()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a target writes from."""

    repertoire: Repertoire
    generation: Generation
    options: Options = NO_OPTIONS

    def base_folder(self) -> Path:
        """The folder of the base model, of targets that require one."""
        assert self.options.base is not None, "checked by Options.check"
        return self.options.base
