"""How answers look to OpenAI's clients: whole objects and chunks of streams, of both kinds of completion.

It knows nothing of calls or engines; every method makes a JSON value.
Read first: our routing report is the extra member `greenroom`, in an answer and in the first chunk of a stream; with
`explain`, the weights of the experts per layer are its member `layers`, in a stream in the chunk that ends it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from runtime.service.report import layers_report, routing_report

if TYPE_CHECKING:
    from runtime.engine.request import Finished, Located, TokenDelta, TokenLogprob, Usage


class Format:
    """The answer to one request.

    Args:
        request_id: becomes the answer's id.
        model: as the client named it.
        chat: chat completion; else a plain one.
    """

    def __init__(self, *, request_id: str, model: str, chat: bool) -> None:
        self._chat = chat
        self._frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, located: Located, deltas: list[TokenDelta], finished: Finished) -> dict[str, Any]:
        """The answer as one object."""
        reasons = (finished.reason, *finished.other_reasons)
        choices = [
            self._choice(index, [delta for delta in deltas if delta.choice == index], reason)
            for index, reason in enumerate(reasons)
        ]
        return {
            **self._frame,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": choices,
            "usage": usage(finished.usage),
            "greenroom": {**routing_report(located), **_explained(finished)},
        }

    def first(self, located: Located, num_choices: int) -> dict[str, Any]:
        """The chunk that begins all choices."""
        begun = {"role": "assistant", "content": ""} if self._chat else ""
        return {
            **self._chunk([self._piece(index, begun) for index in range(num_choices)]),
            "greenroom": routing_report(located),
        }

    def delta(self, delta: TokenDelta) -> dict[str, Any]:
        """A chunk of text."""
        content = {"content": delta.text} if self._chat else delta.text
        return self._chunk([self._piece(delta.choice, content, logprobs=self._logprobs([delta]))])

    def last(self, finished: Finished) -> dict[str, Any]:
        """The chunk that ends all choices."""
        reasons = (finished.reason, *finished.other_reasons)
        content: Any = {} if self._chat else ""
        chunk = self._chunk([self._piece(index, content, reason) for index, reason in enumerate(reasons)])
        return {**chunk, "greenroom": _explained(finished)} if finished.explanation else chunk

    def usage(self, finished: Finished) -> dict[str, Any]:
        """The chunk of usage, without choices."""
        return {**self._chunk([]), "usage": usage(finished.usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._frame, "object": kind, "choices": choices}

    def _piece(self, index: int, content: Any, reason: str | None = None, *, logprobs: Any = None) -> dict[str, Any]:  # noqa: ANN401
        name = "delta" if self._chat else "text"
        return {"index": index, name: content, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, index: int, deltas: list[TokenDelta], reason: str) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": index, **content, "logprobs": self._logprobs(deltas), "finish_reason": reason}

    def _logprobs(self, deltas: list[TokenDelta]) -> dict[str, Any] | None:
        tokens = [token for delta in deltas for token in delta.logprobs]
        if not tokens:
            return None
        return _chat_logprobs(tokens) if self._chat else _plain_logprobs(tokens)


def _explained(finished: Finished) -> dict[str, Any]:
    return {"layers": layers_report(finished)} if finished.explanation else {}


def usage(counted: Usage) -> dict[str, Any]:
    """`usage`."""
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.prompt_tokens + counted.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
    }


def _chat_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    def shown(token: Any) -> dict[str, Any]:  # noqa: ANN401 - an `Alternative`
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}

    content = [{**shown(token.chosen), "top_logprobs": [shown(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _plain_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [token.chosen.text for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [{other.text: other.logprob for other in token.top} for token in tokens],
        "text_offset": None,
    }
