"""How a user's text becomes the token ids that the model reads, in training and in serving alike.

It does not know tasks, experts or chat histories: one input, one prompt.
Read first: only the template's own prefix and suffix may become special tokens; "<|im_end|>" inside a user's text stays
plain text, so that nobody can end their own turn and speak as the assistant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import jinja2
import tokenizers

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.base_tokenizer import BaseTokenizer
from runtime.model.tokenizer_copy import copied

SLOT = "{input}"
_CHATML = ("<|im_start|>", "<|im_end|>")
_PLACEHOLDER = "GREENROOM-INPUT"


class _Prepared(NamedTuple):
    """What one tokenizer makes of one template; the two copies are never changed, so threads may share them."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    parsing: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer


@dataclass(frozen=True)
class PromptTemplate:
    """Text before and after the input.

    Args:
        prefix: text before the input; special tokens in it count as such.
        suffix: text after the input; likewise.

    Raises:
        InvalidInputError: one of them holds the slot `{input}`.
    """

    prefix: str
    suffix: str
    _prepared: WeakKeyDictionary[BaseTokenizer, _Prepared] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if SLOT in self.prefix or SLOT in self.suffix:
            raise InvalidInputError("template", self.text, f"must hold {SLOT} exactly once")

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """The template written as one text with the slot `{input}`; other braces are plain text.

        Raises:
            InvalidInputError: the slot is not there exactly once.
        """
        if text.count(SLOT) != 1:
            raise InvalidInputError("template", text, f"must hold {SLOT} exactly once")
        prefix, suffix = text.split(SLOT)
        return cls(prefix, suffix)

    @property
    def text(self) -> str:
        """What `parse` takes."""
        return f"{self.prefix}{SLOT}{self.suffix}"

    def render(self, text: str) -> str:
        """The whole prompt as text, for people; the model gets `encode`."""
        return f"{self.prefix}{text}{self.suffix}"

    def encode(self, tokenizer: BaseTokenizer, text: str, *, raw: bool = False) -> list[int]:
        """Token ids of the prompt: prefix ids, then those of `text` without special tokens, then suffix ids.

        The three parts are tokenised apart. Where special tokens or line ends surround the input, as in ChatML, this
        equals tokenising the rendered whole. Several threads may call it with the same tokenizer.

        Args:
            tokenizer: a fast tokenizer; its own state is neither used nor changed.
            text: the user's input.
            raw: `text` is the whole prompt: no template, and special tokens in it count as such.

        Raises:
            InvalidInputError: `text` is not valid Unicode (it holds a lone surrogate).
        """
        prepared = self._prepare(tokenizer)
        if raw:
            return _ids(prepared.parsing, text)
        return [*prepared.prefix_ids, *_ids(prepared.plain, text), *prepared.suffix_ids]

    def encode_part(self, tokenizer: BaseTokenizer, text: str, *, plain: bool) -> list[int]:
        """Token ids of a part of a prompt, by itself; special tokens in it count as such unless it is `plain`."""
        prepared = self._prepare(tokenizer)
        return _ids(prepared.plain if plain else prepared.parsing, text)

    def _prepare(self, tokenizer: BaseTokenizer) -> _Prepared:
        prepared = self._prepared.get(tokenizer)
        if prepared is None:
            # Two threads may both come here the first time; they make the same, and one of them stays.
            prepared = self._prepared[tokenizer] = self._copies(tokenizer)
        return prepared

    def _copies(self, tokenizer: BaseTokenizer) -> _Prepared:
        # `transformers` switches special tokens on and off, and truncation too, inside one shared object; with several
        # threads one prompt would be read with the other's setting. So: two copies, each with its setting for good.
        copies = []
        for as_plain_text in (False, True):
            copy = copied(tokenizer.backend_tokenizer)
            copy.encode_special_tokens = as_plain_text
            copies.append(copy)
        parsing, plain = copies
        return _Prepared(tuple(_ids(parsing, self.prefix)), tuple(_ids(parsing, self.suffix)), parsing, plain)


def default_template(base: BaseModel) -> PromptTemplate:
    """The template of a base for which nobody named one.

    ChatML tokenizers get one user turn and no system turn: SmolLM2's default system text costs 21 tokens in every
    prompt and says nothing that experts need. Others get their own chat template, and those without one just the input
    and a line end, after the beginning token if their tokenizer would add it.

    Raises:
        InvalidInputError: the tokenizer's chat template cannot hold one user turn.
    """
    tokenizer = base.tokenizer
    chat_template = tokenizer.chat_template
    start, end = _CHATML
    if isinstance(chat_template, str) and start in chat_template and end in chat_template:
        return PromptTemplate(f"{start}user\n", f"{end}\n{start}assistant\n")
    if chat_template:
        turn = [{"role": "user", "content": _PLACEHOLDER}]
        try:
            rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError) as error:
            raise InvalidInputError("chat_template", chat_template, f"cannot render one user turn: {error}") from error
        return PromptTemplate.parse(rendered.replace(_PLACEHOLDER, SLOT))
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return PromptTemplate(tokenizer.bos_token if begins else "", "\n")


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError("text", text, f"is not valid Unicode at character {error.start}") from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
