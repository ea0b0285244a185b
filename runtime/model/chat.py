"""Chats: turns of system, user and assistant become one prompt through the base's own chat template.

It knows nothing of tasks or requests.
Read first: as in `runtime.model.prompt`, only the template's own text may become special tokens; what people say stays
plain text. So the template is rendered with marks in place of the contents, and the contents are put in afterwards,
word for word: a template that trims or inspects them does not get to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2

from runtime.errors import InvalidInputError
from runtime.model.base_tokenizer import BaseTokenizer
from runtime.model.prompt import PromptTemplate
from runtime.model.turns import Message

_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template writes by itself


def encode_chat(template: PromptTemplate, tokenizer: BaseTokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, up to where the assistant begins to speak.

    A single user turn is what the repertoire's experts were trained on: it is encoded by the repertoire's `template`,
    like any input. Other chats go through the tokenizer's chat template.

    Args:
        template: of the repertoire.
        tokenizer: of the base; its own state is neither used nor changed.
        messages: checked.

    Raises:
        InvalidInputError: the base has no chat template, it refuses this chat, or it leaves out a message.
    """
    if [message.role for message in messages] == ["user"]:
        return template.encode(tokenizer, messages[0].content)
    if not tokenizer.chat_template:
        raise InvalidInputError("messages", len(messages), "the base has no chat template; it reads one user message")
    marked = [{"role": message.role, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    try:
        rendered: str = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError) as error:
        raise InvalidInputError("messages", len(messages), f"the base's chat template refuses them: {error}") from error
    pieces = _MARK.split(rendered)
    if [int(place) for place in pieces[1::2]] != list(range(len(messages))):
        raise InvalidInputError("messages", len(messages), "the base's chat template leaves out or repeats a message")
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        ids += template.encode_part(tokenizer, messages[int(piece)].content if i % 2 else piece, plain=bool(i % 2))
    return ids
