"""Examples as token ids, and batches of similar length.

It does not know models, experts or losses.
Read first: rows are padded on the right. Attention is causal, so no real token ever sees padding and no attention mask
is needed; what is computed at the padding is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from runtime.errors import DataError, InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.prompt import PromptTemplate
from training.data import Example

_PLAIN = PromptTemplate("", "")
_BATCHES_PER_POOL = 8


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        prompt: as serving will send it, and behind it the part of the answer that is given.
        answer: what is learned, with the end token where the answer ends there.
        given: number of tokens at the end of `prompt` that belong to the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    given: int = 0

    @property
    def asked(self) -> tuple[int, ...]:
        """The prompt as serving will send it."""
        return self.prompt[: len(self.prompt) - self.given]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads: the end token is only predicted."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    Args:
        ids: [B, T] int64, padded on the right.
        real: [B, T] bool, False at the padding.
        predicts: [B, T] bool, True where the next token belongs to the answer.
        targets: [n] int64, these next tokens, in row-major order of `predicts`.
    """

    ids: torch.Tensor
    real: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor


def encode_row(base: BaseModel, template: PromptTemplate, text: str, answer: str, *, max_tokens: int) -> Row:
    """Tokenise one example; special tokens written in either text stay plain text.

    Raises:
        InvalidInputError: it has more than `max_tokens` tokens.
    """
    prompt = template.encode(base.tokenizer, text)
    row = Row(tuple(prompt), (*_PLAIN.encode(base.tokenizer, answer), base.eos_token_ids[0]))
    if row.num_tokens > max_tokens:
        raise InvalidInputError("input", text, f"the example has {row.num_tokens} tokens, max_tokens={max_tokens}")
    return row


def encode_example(base: BaseModel, template: PromptTemplate, example: Example, *, max_tokens: int) -> Row:
    """`encode_row` of an example, of which only the piece `learned` is learned where it names one.

    Raises:
        DataError: it cannot be used, and was read from a file; the message names the line.
        InvalidInputError: it cannot be used, and was not: it is too long, or `learned` does not occur exactly once in
            `output`, or begins or ends within a token.
    """
    try:
        row = encode_row(base, template, example.input, example.output, max_tokens=max_tokens)
        return row if example.learned is None else _learned(base, row, example.output, example.learned)
    except InvalidInputError as error:
        if example.source:
            raise DataError(example.source, example.line, str(error)) from error
        raise


def _learned(base: BaseModel, row: Row, output: str, learned: str) -> Row:
    """The row of one piece of the answer: what stands before it is given, what stands after it is left out."""
    if output.count(learned) != 1:
        raise InvalidInputError("learned", learned, f"must occur exactly once in output={output!r}")
    start = output.index(learned)
    end = start + len(learned)
    given, read = (tuple(_PLAIN.encode(base.tokenizer, output[:place])) for place in (start, end))
    if row.answer[: len(given)] != given or row.answer[: len(read)] != read:
        raise InvalidInputError("learned", learned, f"begins or ends within a token of output={output!r}")
    # The end token is learned with the answer's last piece alone.
    learns = row.answer[len(given) :] if end == len(output) else row.answer[len(given) : len(read)]
    return Row((*row.prompt, *given), learns, len(given))


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Put rows into one batch as long as its longest row."""
    longest = max(row.num_tokens for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    predicts = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : row.num_tokens] = torch.tensor((*row.prompt, *row.answer)[:-1])
        real[i, : row.num_tokens] = True
        predicts[i, len(row.prompt) - 1 : row.num_tokens] = True
    targets = torch.tensor([token for row in rows for token in row.answer])
    return Batch(ids.to(device), real.to(device), predicts.to(device), targets.to(device))


def shuffled_batches(rows: Sequence[Row], *, batch_size: int, rng: random.Random) -> Iterator[list[Row]]:
    """One pass over all rows in random order, rows of similar length together.

    Pools of a few batches are drawn at random and sorted by length within; so padding is small, and batches still
    differ from pass to pass.
    """
    order = list(rows)
    rng.shuffle(order)
    size = batch_size * _BATCHES_PER_POOL
    pools = [sorted(order[i : i + size], key=lambda row: row.num_tokens) for i in range(0, len(order), size)]
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    yield from batches
