"""What one constrained answer may still become, as a mask over the vocabulary.

It knows nothing of how a constraint is compiled, nor of sampling's other steps.
Read first: a matcher belongs to one answer and follows it token by token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from runtime.errors import InvalidInputError


class Matcher:
    """What one answer may still become.

    Args:
        matcher: of `llguidance`, at its beginning, for this answer alone.
        field: the option that holds the constraint, for errors.
        text: the constraint.
    """

    def __init__(self, matcher: Any, field: str, text: str) -> None:  # noqa: ANN401 - the library's own class
        self._matcher = matcher
        self._field = field
        self._text = text

    def mask(self, scores: torch.Tensor) -> None:
        """Set every token of `scores` [V] that cannot come next to minus infinity, in place.

        Raises InvalidInputError where the constraint became too complex to follow.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(words, bitorder="little")[: scores.shape[0]]
        scores[: allowed.size].masked_fill_(torch.from_numpy(allowed == 0), -math.inf)
        scores[allowed.size :] = -math.inf

    def advance(self, token: int) -> bool:
        """Take a token that the mask allowed; True where the answer is complete and nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidInputError(self._field, self._text, f"cannot be followed: {self._matcher.get_error()}")
