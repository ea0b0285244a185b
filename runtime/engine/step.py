"""A step: which tokens of which sequences go through which layers together.

It knows nothing of how it was chosen or how it is computed.
Read first: the scheduler makes it, the runner runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class PromptPart:
    """Tokens `start .. start + length` of a prompt, on their way through `layers`."""

    sequence: Sequence
    start: int
    length: int
    layers: range


@dataclass(frozen=True)
class Step:
    """The work of one step.

    Args:
        decode: sequences that get one more token.
        prompts: parts of prompts, at most one of a sequence.
    """

    decode: tuple[Sequence, ...]
    prompts: tuple[PromptPart, ...]

    @property
    def empty(self) -> bool:
        """Nothing to run."""
        return not (self.decode or self.prompts)
