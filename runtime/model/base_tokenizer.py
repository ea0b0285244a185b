"""The tokenizer of a base: loaded with `transformers`, or read from its files where these say all that matters.

It does not know prompts or templates.
Read first: serving needs ids of texts and texts of ids, which is what `tokenizers` does; `transformers` costs half a
second and 40 MB beside it. So `read_tokenizer` leaves it out where it would change nothing, until a chat is rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from runtime.errors import InvalidInputError, UnknownBaseError
from runtime.model.json_object import read_json_object

if TYPE_CHECKING:
    import transformers

_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of `transformers` that take tokenizer.json as it is."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_UNDERSTOOD = {
    *_SPECIAL,
    *("backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_max_length"),
    *("name_or_path", "padding_side", "tokenizer_class", "truncation_side"),
}
"""Fields of tokenizer_config.json that change no ids."""
_ELSEWHERE = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
_MOST_TOKENS = 100_000  # beyond this `transformers` looks for a wrong expression of Mistral's, and mends it


class BaseTokenizer(Protocol):
    """What serving asks of a tokenizer; those of `transformers` have it."""

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """Text to ids and back."""

    @property
    def chat_template(self) -> Any:  # noqa: ANN401 - a template, or several by name
        """In Jinja; None where there is none."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Turns as the text of a prompt."""


class StoredTokenizer:
    """A tokenizer as its folder says, without `transformers` until a chat is rendered.

    Args:
        folder: of the base; see `read_tokenizer`.
        config: tokenizer_config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        template = folder / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
        end = config.get("eos_token")
        self.eos_token_id = None if end is None else self.backend_tokenizer.token_to_id(end)

    @cached_property
    def _whole(self) -> transformers.PreTrainedTokenizerFast:
        return load_tokenizer(self._folder)

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """See `BaseTokenizer`; the first call loads `transformers`."""
        rendered: str = self._whole.apply_chat_template(
            conversation, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )
        return rendered


def read_tokenizer(folder: Path) -> StoredTokenizer | transformers.PreTrainedTokenizerFast:
    """The base's tokenizer; `transformers` is asked where its files leave anything open.

    Raises:
        UnknownBaseError: as `load_tokenizer`.
    """
    try:
        config = read_json_object(folder / "tokenizer_config.json")
    except (OSError, InvalidInputError):
        return load_tokenizer(folder)
    if config.get("tokenizer_class") in _PLAIN and not _left_open(folder, config):
        try:
            found = StoredTokenizer(folder, config)
        except Exception as error:  # the library raises nothing narrower
            raise UnknownBaseError(f"{folder}: its tokenizer does not load: {error}") from error
        if _says_all(found.backend_tokenizer, config):
            return found
    return load_tokenizer(folder)


def _left_open(folder: Path, config: Mapping[str, Any]) -> bool:
    with_options = any(not isinstance(config.get(field), str | None) for field in _SPECIAL)
    return bool(config.keys() - _UNDERSTOOD) or with_options or any((folder / name).exists() for name in _ELSEWHERE)


def _says_all(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether the special tokens that the config names are there, and nothing is mended."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = {config[field] for field in _SPECIAL if config.get(field) is not None}
    return named <= special and backend.get_vocab_size() <= _MOST_TOKENS


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """The base's tokenizer, by `transformers`.

    Raises:
        UnknownBaseError: it cannot be loaded, or has no fast form.
    """
    import transformers

    try:
        named = read_json_object(folder / "tokenizer_config.json").get("tokenizer_class")
    except (OSError, InvalidInputError):
        named = None
    # These need nothing but tokenizer.json; to look for others `transformers` imports all of its models.
    loads = transformers.PreTrainedTokenizerFast if named in _PLAIN else transformers.AutoTokenizer
    with quiet_transformers():
        try:
            tokenizer = loads.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UnknownBaseError(f"{folder}: its tokenizer does not load: {error}") from error
    if not tokenizer.is_fast:
        raise UnknownBaseError(f"{folder} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def end_tokens(folder: Path, told: int | list[int] | None, end: int | None) -> tuple[int, ...]:
    """Tokens that end an answer: those that the generation config tells, else the tokenizer's.

    Raises:
        UnknownBaseError: neither names one.
    """
    found = end if told is None else told
    ids = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not ids or ids[0] is None:
        raise UnknownBaseError(f"{folder} names no end token in generation_config.json or its tokenizer")
    return tuple(int(token_id) for token_id in ids if token_id is not None)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from `transformers` inside; its settings are put back afterwards."""
    import transformers

    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
