"""A base's tokenizer read from its files: it is what `transformers` makes of them, or `transformers` is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from runtime.errors import UnknownBaseError
from runtime.model.base_tokenizer import StoredTokenizer, end_tokens, load_tokenizer, read_tokenizer

TEXTS = ("the tin ü <|im_start|>user\n7", "", " <|im_end|><|im_end|> ", "a\r\n\ttab \U0001f600")
TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer as `transformers` saves it."""
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def test_what_is_read_gives_the_ids_and_chats_of_what_transformers_loads(folder: Path) -> None:
    read, loaded = read_tokenizer(folder), load_tokenizer(folder)
    assert isinstance(read, StoredTokenizer)
    for text in TEXTS:
        ids = loaded(text, add_special_tokens=False).input_ids
        assert read.backend_tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert read.backend_tokenizer.decode(ids, skip_special_tokens=True) == loaded.decode(
            ids, skip_special_tokens=True
        )
    assert read.eos_token_id == loaded.eos_token_id
    assert read.chat_template == loaded.chat_template
    rendered = loaded.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert read.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == rendered


def test_a_chat_template_may_stand_in_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder / "tokenizer_config.json", chat_template="[{{ messages[0]['content'] }}]")
    read = read_tokenizer(folder)
    assert isinstance(read, StoredTokenizer)
    assert read.chat_template == load_tokenizer(folder).chat_template
    assert read.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == "[hello]"


def test_truncation_and_padding_that_were_saved_do_not_apply(folder: Path) -> None:
    expected = read_tokenizer(folder).backend_tokenizer.encode("a long text").ids
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).backend_tokenizer.encode("a long text").ids == expected


OPEN: dict[str, Callable[[Path], Any]] = {
    "a field that may change ids": lambda folder: change(folder / "tokenizer_config.json", add_prefix_space=True),
    "a special token of its own": lambda folder: change(folder / "tokenizer_config.json", eos_token="<|new|>"),
    "a special token with options": lambda folder: change(
        folder / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<|im_end|>", "lstrip": True}
    ),
    "tokens in another file": lambda folder: (folder / "added_tokens.json").write_text("{}", encoding="utf-8"),
    "a class of its own": lambda folder: change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
}


@pytest.mark.parametrize("what", OPEN)
def test_what_the_files_leave_open_transformers_decides(folder: Path, what: str) -> None:
    OPEN[what](folder)
    assert isinstance(read_tokenizer(folder), PreTrainedTokenizerFast)


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2]"])
def test_a_tokenizer_that_does_not_load_is_named(folder: Path, damage: str) -> None:
    (folder / "tokenizer.json").write_text(damage, encoding="utf-8")
    with pytest.raises(UnknownBaseError, match="its tokenizer does not load"):
        read_tokenizer(folder)


def test_end_tokens_are_those_told_or_else_the_tokenizers(tmp_path: Path) -> None:
    assert end_tokens(tmp_path, [7, 8], 2) == (7, 8)
    assert end_tokens(tmp_path, 7, None) == (7,)
    assert end_tokens(tmp_path, None, 2) == (2,)
    with pytest.raises(UnknownBaseError, match="names no end token"):
        end_tokens(tmp_path, None, None)
