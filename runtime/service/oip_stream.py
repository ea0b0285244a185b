"""Streams of the Open Inference Protocol: requests and answers interleave on one call.

It knows nothing of what a request means.
Read first: a request that fails says so in its own response and the stream goes on, unless the client asks with the
header `triton_grpc_error: true` that the first failure end the call. A stream reads on only while fewer than
`MAX_REQUESTS` of its requests are in flight; each of them counts for its tenant's quota like a call of its own.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from greenroom.pb.inference import grpc_service_pb2 as pb
from runtime.errors import GreenroomError
from runtime.service.call import CALL
from runtime.service.failures import logged_code
from runtime.service.oip_inference import FINAL
from runtime.service.status import rule_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from runtime.service.call import Call
    from runtime.service.oip_inference import Inferences
    from runtime.service.quota import Quotas

ERROR_HEADER = "triton_grpc_error"
MAX_REQUESTS = 128


class InferenceStream:
    """One call.

    Args:
        inferences: answers the requests.
        call: responses are written to its context.
        quotas: what each request counts against.
    """

    def __init__(self, inferences: Inferences, call: Call, quotas: Quotas) -> None:
        self._inferences = inferences
        self._call = call
        self._quotas = quotas
        self._fails_whole = call.metadata.get(ERROR_HEADER) == "true"
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._writing = asyncio.Lock()

    async def run(self, messages: AsyncIterable[pb.ModelInferRequest]) -> None:
        """Answer everything that comes, until the client sends no more and the last answer is complete.

        Raises:
            Exception: what a request failed with, where the client wants its calls to fail then.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in messages:
                    await self._room.acquire()
                    task = tasks.create_task(self._answer(message))
                    task.add_done_callback(lambda _: self._room.release())
        except* Exception as failures:  # noqa: BLE001 - one failure ends the call, and is its status
            raise failures.exceptions[0] from None

    async def _answer(self, message: pb.ModelInferRequest) -> None:
        try:
            with self._quotas.enter(self._call.principal) as account:
                # This task's own call, with the account that its tokens are charged to.
                CALL.set(replace(self._call, account=account))
                async with aclosing(self._inferences.pieces(message, deadline=self._call.deadline)) as pieces:
                    async for piece in pieces:
                        await self._write(pb.ModelStreamInferResponse(infer_response=piece))
        except Exception as error:  # the client is told of every failure, bugs among them
            if self._fails_whole:
                raise
            logged_code(error, self._call.request_id)
            failed = pb.ModelInferResponse(model_name=message.model_name, id=message.id)
            failed.parameters[FINAL].bool_param = True
            await self._write(pb.ModelStreamInferResponse(error_message=error_text(error), infer_response=failed))

    async def _write(self, response: pb.ModelStreamInferResponse) -> None:
        # A call takes one message at a time.
        async with self._writing:
            await self._call.context.write(response)


def error_text(error: Exception) -> str:
    """The reason and the text that a status would carry."""
    reason = error.reason if isinstance(error, GreenroomError) else GreenroomError.reason
    return f"{reason}: {rule_for(error).text or error}"
