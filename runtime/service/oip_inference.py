"""Answers of the Open Inference Protocol: one whole, or piece by piece.

It knows nothing of calls; `runtime.service.oip_servicer` and its stream send what is made here.
Read first: pieces of a stream are one with the routing alone where it is asked for, one per delta, and one at the end
that is marked as final; texts of the pieces joined are the text of the whole.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING

from greenroom.pb.inference import grpc_service_pb2 as pb
from runtime.engine.request import Finished, Located, TokenDelta
from runtime.errors import InvalidInputError
from runtime.service.auth import check_tenant
from runtime.service.call import CALL
from runtime.service.oip_counts import Counts
from runtime.service.oip_request import Inference, inference_of, on_the_wire
from runtime.service.oip_tensors import ROUTING, TEXT_OUTPUT, TOKEN_IDS, add_output
from runtime.service.report import layers_report, routing_report

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from runtime.service.answers import Answers
    from runtime.service.models import Models

FINAL = "triton_final_response"


class Inferences:
    """Answers requests.

    Args:
        answers: over the engine.
        models: that may be named.
    """

    def __init__(self, answers: Answers, models: Models) -> None:
        self._answers = answers
        self._models = models
        self.counts = Counts()

    async def whole(self, message: pb.ModelInferRequest, *, deadline: float | None) -> pb.ModelInferResponse:
        """One response with the whole answer.

        Raises:
            GreenroomError: why there is none.
        """
        inference = self._understood(message, deadline)
        text: list[str] = []
        token_ids: list[int] = []
        response = _response(inference)
        async with aclosing(self._events(inference)) as events:
            async for event in events:
                match event:
                    case Located():
                        routing = routing_report(event)
                    case TokenDelta():
                        text.append(event.text)
                        token_ids.extend(event.token_ids)
                    case Finished():
                        _finish(response, event)
                        routing["layers"] = layers_report(event)
        values: dict[str, str | Sequence[int]] = {
            TEXT_OUTPUT: "".join(text),
            TOKEN_IDS: token_ids,
            ROUTING: json.dumps(routing),
        }
        for name in inference.outputs:
            add_output(response, name, values[name])
        return response

    async def pieces(
        self, message: pb.ModelInferRequest, *, deadline: float | None
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """Responses as the answer comes; the last one is final.

        Raises:
            GreenroomError: why there is none, or no more.
        """
        inference = self._understood(message, deadline)
        async with aclosing(self._events(inference)) as events:
            async for event in events:
                if not isinstance(event, Located) or ROUTING in inference.outputs:
                    yield _piece(inference, event)

    def _understood(self, message: pb.ModelInferRequest, deadline: float | None) -> Inference:
        principal = CALL.get().principal
        inference = inference_of(message, self._models, deadline=deadline, tenant=principal.tenant)
        check_tenant(principal, inference.request.tenant)
        return inference

    async def _events(self, inference: Inference) -> AsyncGenerator[Located | TokenDelta | Finished, None]:
        with self.counts.measure(inference.model) as measured:
            try:
                async with self._answers.open(inference.request) as events:
                    async for event in events:
                        if isinstance(event, Finished):
                            measured.usage = event.usage
                        yield event
            except InvalidInputError as error:
                raise on_the_wire(error) from error


def _response(inference: Inference) -> pb.ModelInferResponse:
    model = inference.model
    return pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=inference.client_id)


def _piece(inference: Inference, event: Located | TokenDelta | Finished) -> pb.ModelInferResponse:
    response = _response(inference)
    response.parameters[FINAL].bool_param = isinstance(event, Finished)
    match event:
        case Located():
            add_output(response, ROUTING, json.dumps(routing_report(event)))
        case TokenDelta():
            _add_tokens(response, inference, event)
        case Finished():
            _finish(response, event)
            if not inference.empty_final:
                _add_tokens(response, inference, TokenDelta("", ()))
    return response


def _add_tokens(response: pb.ModelInferResponse, inference: Inference, delta: TokenDelta) -> None:
    values: dict[str, str | Sequence[int]] = {TEXT_OUTPUT: delta.text, TOKEN_IDS: delta.token_ids}
    for name in inference.outputs:
        if name in values:
            add_output(response, name, values[name])


def _finish(response: pb.ModelInferResponse, finished: Finished) -> None:
    response.parameters["finish_reason"].string_param = finished.reason
    response.parameters["prompt_tokens"].int64_param = finished.usage.prompt_tokens
    response.parameters["completion_tokens"].int64_param = finished.usage.completion_tokens
    if finished.explanation:
        response.parameters["layers"].string_param = json.dumps(layers_report(finished))
