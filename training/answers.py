"""Greedy answers of the base with whatever is attached to it, in batches with a KV cache.

It does not know tasks or mixtures: the caller attaches them around the call.
Read first: prompts of similar length run together, padded on the left. An answer is cut where it is longer than the
expected one can be, which never turns a wrong answer into a right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from runtime.model.base import BaseModel
from training.data import Example

_BATCH_SIZE = 50
_SPARE_TOKENS = 2  # the end token, and one more than was asked for shows that an answer goes on
_NUM_WITNESSES = 2


@dataclass(frozen=True)
class Question:
    """One test example: the prompt's token ids, the expected answer, and how many tokens are generated at most."""

    prompt: tuple[int, ...]
    expected: str
    limit: int


def question(base: BaseModel, prompt: Sequence[int], example: Example) -> Question:
    """What is asked for one test example."""
    expected = base.tokenizer(example.output, add_special_tokens=False).input_ids
    return Question(tuple(prompt), example.output, len(expected) + _SPARE_TOKENS)


@torch.inference_mode()
def greedy_answers(base: BaseModel, questions: Sequence[Question], *, batch_size: int = _BATCH_SIZE) -> list[str]:
    """The answer to every question, in their order."""
    answers = [""] * len(questions)
    for chosen in _batches(questions, batch_size):
        prompts, limit = [questions[i].prompt for i in chosen], max(questions[i].limit for i in chosen)
        for i, tokens in zip(chosen, _decode(base, prompts, limit), strict=True):
            answers[i] = base.tokenizer.decode(_until_end(tokens, base.eos_token_ids))
    return answers


def _decode(base: BaseModel, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Up to `limit` tokens for every prompt; what follows an end token means nothing."""
    device = base.model.device
    ids, mask = (tensor.to(device) for tensor in _left_padded(prompts, base.eos_token_ids[0]))
    ends = torch.tensor(base.eos_token_ids, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache, head, chosen = DynamicCache(), base.model.get_output_embeddings(), []
    for _ in range(limit):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = base.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        # The head gets [B, D]: given a strided [B, 1, D] it copies the whole vocabulary matrix per row.
        ids = head(hidden[:, -1].contiguous()).argmax(1, keepdim=True)
        chosen.append(ids)
        ended |= torch.isin(ids[:, 0], ends)
        if ended.all():
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    rows: list[list[int]] = torch.cat(chosen, 1).tolist()
    return rows


@torch.inference_mode()
def fingerprint(base: BaseModel, prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 over the logits [T, V] of a few prompts, bit for bit: equal ones mean that the outputs did not move.

    Args:
        base: with the mixture attached that is to be identified.
        prompts: of which the first few are run, one by one.
    """
    digest = hashlib.sha256()
    for prompt in prompts[:_NUM_WITNESSES]:
        logits = base.model(torch.tensor([list(prompt)], device=base.model.device), use_cache=False).logits
        digest.update(logits.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _batches(questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [B, T] each."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:position])
    return list(tokens)
