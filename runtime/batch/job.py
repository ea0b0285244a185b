"""A job: which rows are answered how, and where the answers go.

It knows nothing of how that is done.
Read first: `identity` is what the bytes of the result depend on; an interrupted run is only taken up by a job with the
same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.batch.places import Place
from runtime.batch.plan import Sizes
from runtime.batch.rows import LOCATE_ROWS, SHARD_ROWS
from runtime.batch.sources import Format
from runtime.engine.request import SamplingParams
from runtime.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    Args:
        source: file of rows.
        source_format: of the source.
        target: file, or folder where `target_is_folder`.
        target_format: of the target.
        target_is_folder: write one part per shard instead of one file in the order of the source.
        sampling: for rows that do not say otherwise; without a seed, 0 is taken.
        generation: number of the generation that answers.
        sizes: what each of its tasks needs in memory, see `runtime.batch.plan.unit_sizes`.
        budget_bytes: expert memory of a worker.
        settings: everything else that answers depend on (base, engine options); JSON values, compared on resuming.
        shard_rows: rows answered together at most; more fill batches better, fewer lose less when interrupted.
        fresh: forget what an interrupted run left.

    Raises:
        InvalidInputError: a value that cannot be used.
    """

    source: Place
    source_format: Format
    target: Place
    target_format: Format
    target_is_folder: bool
    sampling: SamplingParams
    generation: int
    sizes: Sizes
    budget_bytes: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    shard_rows: int = SHARD_ROWS
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise InvalidInputError("shard_rows", self.shard_rows, "must be at least 1")
        if "openai" in {self.source_format, self.target_format} and self.source_format != self.target_format:
            raise InvalidInputError("target_format", self.target_format, "openai goes in and out, or neither")

    def side(self, name: str) -> Place:
        """A file that belongs to the answers: in the target's folder, or beside the target."""
        return self.target / name if self.target_is_folder else self.target.beside(f".{name}")

    def identity(self, source_sha256: str) -> dict[str, Any]:
        """What the bytes of the result depend on."""
        return {
            "schema": 1,
            "source": self.source.url,
            "source_sha256": source_sha256,
            "source_format": self.source_format,
            "target_format": self.target_format,
            "target_is_folder": self.target_is_folder,
            "generation": self.generation,
            "shard_rows": self.shard_rows,
            "locate_rows": LOCATE_ROWS,
            "budget_bytes": self.budget_bytes,
            **{f"sampling.{name}": value for name, value in asdict(self.sampling).items()},
            **{f"settings.{name}": value for name, value in self.settings.items()},
        }
