"""Who does the work of a run: one engine in this process, or (in `runtime.scale`) many in others.

It knows nothing of files.
Read first: work may come back in any order; a piece comes back once or the run fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from runtime.batch.answering import Answered, answer, locate
from runtime.batch.rows import Location, Prompt
from runtime.engine.engine import Engine

Piece = tuple[int, tuple[Prompt, ...]]
"""Number of a chunk or shard, and its prompts."""


class Workers(Protocol):
    """Locates chunks and answers shards."""

    def locate(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, tuple[Location, ...]]]:
        """Locate the prompts of every chunk."""

    def answer(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Answered]]:
        """Answer the prompts of every shard."""


class OneEngine:
    """One engine, in this process.

    Args:
        engine: started; nobody else uses it meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def locate(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, tuple[Location, ...]]]:
        """Chunk by chunk, in order."""
        return ((number, locate(self._engine, prompts)) for number, prompts in pieces)

    def answer(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Answered]]:
        """Shard by shard, in order."""
        return ((number, answer(self._engine, prompts)) for number, prompts in pieces)
