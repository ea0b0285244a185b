"""A fixed set of short prompts about everything and nothing.

It does not know any task, and no task's data comes from it; `reference_prompts.txt` holds the words.
Read first: the locator measures every task against these prompts. They stand for whatever people may ask of which
nobody trained a task, so they should be of as many kinds as possible; how many prompts of unknown tasks are refused
depends on that.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
_FILLED = 2  # prompts out of one frame with slots
_STRIDE = 17  # prime, so that every filler gets its turn
_SLOT = re.compile(r"\{(\w+)\}")


def reference_prompts() -> tuple[str, ...]:
    """About 600 different short prompts of many kinds and several languages, always the same, in a fixed order."""
    return tuple(_filled())


def reference_kinds() -> tuple[int, ...]:
    """For each of the reference prompts which kind it is of, counted from 0: the heading under which it stands."""
    return tuple(_filled().values())


def _filled() -> dict[str, int]:
    """Prompt -> its kind; one that comes twice counts where it came first."""
    fillers, frames = _read(FILE.read_text(encoding="utf-8"))
    used: Counter[str] = Counter()

    def fill(slot: re.Match[str]) -> str:
        words = fillers[slot[1]]
        used[slot[1]] += 1
        times = used[slot[1]]
        return words[(times * _STRIDE + times // len(words)) % len(words)]

    prompts: dict[str, int] = {}
    for kind, frame in frames:
        for _ in range(_FILLED if _SLOT.search(frame) else 1):
            prompts.setdefault(_SLOT.sub(fill, frame), kind)
    return prompts


def _read(text: str) -> tuple[dict[str, list[str]], list[tuple[int, str]]]:
    """Fillers by the name of their slot, before the first heading; and behind it kinds and their frames."""
    words, *kinds = text.split("\n## ")
    fillers = dict(line.split(" = ") for line in words.splitlines() if line)
    frames = [(i, line.replace("\\n", "\n")) for i, kind in enumerate(kinds) for line in kind.splitlines()[1:] if line]
    return {slot: found.split("|") for slot, found in fillers.items()}, frames
