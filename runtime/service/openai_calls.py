"""The calls of OpenAI's API that are served: completions, chat completions, models.

It knows nothing of the layers around it: what goes wrong is raised.
Read first: a stream that ended well ends with `[DONE]`, one that did not with an error object.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from runtime.engine.request import Finished, Located, TokenDelta
from runtime.errors import InvalidInputError
from runtime.service.call import CALL
from runtime.service.openai_body import ChatBody, CompletionBody, parse
from runtime.service.openai_format import Format
from runtime.service.openai_request import engine_request, on_the_wire
from runtime.service.request_id import REQUEST_ID

if TYPE_CHECKING:
    from runtime.engine.request import Request
    from runtime.service.answers import Answers
    from runtime.service.http_exchange import Exchange
    from runtime.service.models import Model, Models

DONE = "[DONE]"


class OpenAICalls:
    """Answers from one engine.

    Args:
        answers: over the engine.
        models: that may be named.
    """

    def __init__(self, answers: Answers, models: Models) -> None:
        self._answers = answers
        self._models = models

    async def completions(self, exchange: Exchange) -> None:
        """`POST /v1/completions`."""
        await self._complete(exchange, parse(CompletionBody, await exchange.body()))

    async def chat(self, exchange: Exchange) -> None:
        """`POST /v1/chat/completions`."""
        await self._complete(exchange, parse(ChatBody, await exchange.body()))

    async def list_models(self, exchange: Exchange) -> None:
        """`GET /v1/models`."""
        shown = [_shown(model) for model in self._models.all() if model.state == "READY"]
        exchange.reply_json({"object": "list", "data": shown})

    async def model(self, exchange: Exchange, name: str) -> None:
        """`GET /v1/models/NAME`.

        Raises:
            UnknownModelError, UnavailableError.
        """
        exchange.reply_json(_shown(self._models.get_ready(name)))

    async def _complete(self, exchange: Exchange, body: ChatBody | CompletionBody) -> None:
        request = engine_request(
            body, self._models.get_ready(body.model), request_id=REQUEST_ID.get(), tenant=CALL.get().principal.tenant
        )
        form = Format(request_id=request.request_id, model=body.model, chat=isinstance(body, ChatBody))
        answer = self._stream if body.stream else self._whole
        try:
            await exchange.while_connected(answer(exchange, body, request, form))
        except InvalidInputError as error:
            raise on_the_wire(error, body) from error

    async def _whole(
        self, exchange: Exchange, _body: ChatBody | CompletionBody, request: Request, form: Format
    ) -> None:
        deltas: list[TokenDelta] = []
        async with self._answers.open(request) as events:
            async for event in events:
                match event:
                    case Located():
                        located = event
                    case TokenDelta():
                        deltas.append(event)
                    case Finished():
                        finished = event
        exchange.reply_json(form.whole(located, deltas, finished))

    async def _stream(
        self, exchange: Exchange, body: ChatBody | CompletionBody, request: Request, form: Format
    ) -> None:
        async with self._answers.open(request) as events:
            async for event in events:
                match event:
                    case Located():
                        chunk = form.first(event, request.sampling.n)
                    case TokenDelta():
                        chunk = form.delta(event)
                    case Finished():
                        chunk, finished = form.last(event), event
                await exchange.event(json.dumps(chunk))
        if body.include_usage:
            await exchange.event(json.dumps(form.usage(finished)))
        exchange.last_event(DONE)


def _shown(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "greenroom", "generation": model.version}
