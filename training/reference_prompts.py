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
    fillers, frames = _read(FILE.read_text(encoding="utf-8"))
    used: Counter[str] = Counter()

    def fill(slot: re.Match[str]) -> str:
        words = fillers[slot[1]]
        used[slot[1]] += 1
        times = used[slot[1]]
        return words[(times * _STRIDE + times // len(words)) % len(words)]

    prompts = [_SLOT.sub(fill, frame) for frame in frames for _ in range(_FILLED if _SLOT.search(frame) else 1)]
    return tuple(dict.fromkeys(prompts))


def _read(text: str) -> tuple[dict[str, list[str]], list[str]]:
    """Fillers by the name of their slot, and frames: what stands before the first heading, and after it."""
    words, *kinds = text.split("\n## ")
    fillers = dict(line.split(" = ") for line in words.splitlines() if line)
    frames = [frame for kind in kinds for frame in kind.splitlines()[1:] if frame]
    return {slot: found.split("|") for slot, found in fillers.items()}, [one.replace("\\n", "\n") for one in frames]
