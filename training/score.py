"""Scores of answers against what was expected.

It does not know models or tasks: strings in, numbers out.
Read first: white space never decides; everything else does, capitals included.
"""

from __future__ import annotations

from collections.abc import Sequence


def normalise(text: str) -> str:
    """`text` with every run of white space as one space and none at the ends."""
    return " ".join(text.split())


def is_exact(answer: str, expected: str) -> bool:
    """Whether the two are equal after `normalise`."""
    return normalise(answer) == normalise(expected)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are exact, 0..1; 0 for none at all.

    Raises:
        ValueError: the two differ in length.
    """
    exact = [is_exact(answer, wanted) for answer, wanted in zip(answers, expected, strict=True)]
    return sum(exact) / len(exact) if exact else 0.0
