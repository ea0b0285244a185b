"""Log-probabilities as answers report them.

It knows nothing of how a token was chosen.
Read first: natural logarithms of the model's own distribution, before penalties, constraints and temperature.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from runtime.engine.request import Alternative, TokenLogprob


def token_logprob(logits: torch.Tensor, token: int, num_top: int, tokenizer: Tokenizer) -> TokenLogprob:
    """`log softmax(logits)` of `token` and of the `num_top` likeliest tokens, for logits [V] float32."""
    logprobs = torch.log_softmax(logits.float(), dim=0)
    values, ids = logprobs.topk(min(num_top, logprobs.shape[0])) if num_top else (logprobs[:0], logprobs[:0])
    top = tuple(
        Alternative(int(other), token_text(tokenizer, int(other)), value)
        for other, value in zip(ids.tolist(), values.tolist(), strict=True)
    )
    return TokenLogprob(Alternative(token, token_text(tokenizer, token), float(logprobs[token])), top)


def continuation_logprobs(logits: torch.Tensor, tokens: list[int]) -> list[float]:
    """`log softmax(logits[t])[tokens[t]]` for logits [T, V] float32 and T tokens."""
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))[:, 0]
    values: list[float] = (chosen - logits.logsumexp(1)).tolist()
    return values


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token's own text; bytes that are no whole character show as the replacement character."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text
