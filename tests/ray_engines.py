"""What Ray's processes build in tests, importable by name there.

It does not know any test.
Read first: `build_noted` leaves a file named after the process in a folder, so that a test can kill that process.
"""

from __future__ import annotations

import os
from pathlib import Path

from greenroom.cli.build_engine import build_engine, open_repertoire
from greenroom.cli.engine_flags import EngineFlags
from runtime.engine.engine import Engine
from runtime.engine.follower import HeadFollower
from runtime.engine.options import EngineOptions


def tiny_flags(repertoire: Path, base: Path, **limits: int) -> EngineFlags:
    """Flags of an engine on the tiny base, one thread."""
    return EngineFlags(
        repertoire=repertoire,
        trust=None,
        base=str(base),
        dtype="float32",
        step="torch",
        device="cpu",
        cuda_graphs="auto",
        threads=1,
        limits=EngineOptions(**{"max_context": 256, "prefetch": False, **limits}),  # type: ignore[arg-type]
    )


def build_noted(flags: EngineFlags, folder: Path) -> Engine:
    """An engine, and a note of who built it."""
    (folder / str(os.getpid())).touch()
    return build_engine(flags)


def follow_fast(flags: EngineFlags, engine: Engine) -> HeadFollower:
    """Follows HEAD at short intervals."""
    return HeadFollower(open_repertoire(flags), engine, interval_s=0.1)


class ByWords:
    """An entry's locator for tests: a prompt's first word names the task."""

    def __call__(self, prompt: str) -> str | None:
        return prompt.split(maxsplit=1)[0]
