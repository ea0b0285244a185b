"""Text as it streams: whole characters, stop strings held back, nothing lost at the end."""

from __future__ import annotations

import pytest

from runtime.engine.text import TextStream
from runtime.model.base import BaseModel


def stream(base: BaseModel, text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """Push the tokens of `text` until a stop string is complete."""
    tokenizer = base.tokenizer.backend_tokenizer
    pieces, out = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text).ids:
        piece, stopped = pieces.push(token)
        out.append(piece)
        if stopped:
            return out, True
    return [*out, pieces.finish()], False


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本", "emoji 🙂 end"])
def test_the_pieces_make_up_the_text(tiny_base: BaseModel, text: str) -> None:
    pieces, stopped = stream(tiny_base, text, ())
    assert "".join(pieces) == text
    assert not stopped
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_stop_string_ends_the_text_even_when_tokens_split_it(tiny_base: BaseModel) -> None:
    pieces, stopped = stream(tiny_base, "one END two", ("END", "two"))
    assert ("".join(pieces), stopped) == ("one ", True)


def test_what_looks_like_a_stop_string_and_is_none_comes_out_in_the_end(tiny_base: BaseModel) -> None:
    pieces, stopped = stream(tiny_base, "one EN", ("END",))
    assert ("".join(pieces), stopped) == ("one EN", False)
    assert pieces[-1] == "EN", "held back until the end"


def test_an_incomplete_character_at_the_end_is_shown_as_such(tiny_base: BaseModel) -> None:
    tokenizer = tiny_base.tokenizer.backend_tokenizer
    pieces = TextStream(tokenizer, ())
    first_byte = tokenizer.encode("é").ids[0]
    assert pieces.push(first_byte) == ("", False)
    assert pieces.finish() == "\N{REPLACEMENT CHARACTER}"
