"""The calls of the Open Inference Protocol v2.

It knows nothing of statuses and request ids (see `runtime.service.guard`) or of what answers.
Read first: what is not declared in protos/inference, shared memory among it, gRPC itself answers with UNIMPLEMENTED.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import grpc.aio

from greenroom.pb.inference import grpc_service_pb2 as pb
from greenroom.pb.inference import grpc_service_pb2_grpc
from runtime.errors import InvalidInputError, UnknownModelError
from runtime.service import oip_description as description
from runtime.service.call import CALL
from runtime.service.convert import reject_unknown
from runtime.service.oip_inference import Inferences
from runtime.service.oip_request import EMPTY_FINAL
from runtime.service.oip_stream import InferenceStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from runtime.service.answers import Answers
    from runtime.service.models import Models
    from runtime.service.quota import Quotas


INFERENCE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class InferenceServicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers from one engine.

    Args:
        answers: over the engine.
        models: that may be named.
        quotas: what each request of a stream counts against.
    """

    def __init__(self, answers: Answers, models: Models, quotas: Quotas) -> None:
        self._inferences = Inferences(answers, models)
        self._models = models
        self._quotas = quotas

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register these calls."""
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:  # noqa: N802, ANN401, ARG002
        """True."""
        reject_unknown(request)
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:  # noqa: N802, ANN401, ARG002
        """Whether requests are taken."""
        reject_unknown(request)
        return pb.ServerReadyResponse(ready=self._models.is_ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:  # noqa: N802, ANN401, ARG002
        """Whether a model takes requests; one that does not exist does not."""
        reject_unknown(request)
        try:
            model = self._models.get(request.name, request.version)
        except UnknownModelError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=model.state == "READY")

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:  # noqa: N802, ANN401, ARG002
        """Name, version, extensions."""
        reject_unknown(request)
        return description.server(importlib.metadata.version("greenroom"))

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:  # noqa: N802, ANN401, ARG002
        """Versions and tensors."""
        reject_unknown(request)
        return description.metadata(self._models.get(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:  # noqa: N802, ANN401, ARG002
        """The same as a configuration."""
        reject_unknown(request)
        return description.config(self._models.get(request.name, request.version))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: N802, ANN401, ARG002
        """Return one whole answer."""
        if EMPTY_FINAL in request.parameters:
            raise InvalidInputError(f"parameters.{EMPTY_FINAL}", "set", "only a stream has a final response")
        return await self._inferences.whole(request, deadline=CALL.get().deadline)

    async def ModelStreamInfer(self, requests: AsyncIterable[pb.ModelInferRequest], context: Any) -> None:  # noqa: N802, ANN401, ARG002
        """Write pieces of answers as they come."""
        await InferenceStream(self._inferences, CALL.get(), self._quotas).run(requests)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:  # noqa: N802, ANN401, ARG002
        """Counts and times of one model or all."""
        reject_unknown(request)
        models = (self._models.get(request.name, request.version),) if request.name else self._models.all()
        return pb.ModelStatisticsResponse(model_stats=[self._inferences.counts.of(model) for model in models])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:  # noqa: N802, ANN401, ARG002
        """All models and their states."""
        reject_unknown(request)
        self._check_repository(request.repository_name)
        wanted = [model for model in self._models.all() if model.state == "READY" or not request.ready]
        return description.index(wanted)

    async def RepositoryModelLoad(  # noqa: N802
        self,
        request: pb.RepositoryModelLoadRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> pb.RepositoryModelLoadResponse:
        """Make a model take requests, its experts read."""
        reject_unknown(request)
        self._check_repository(request.repository_name)
        _reject_parameters(request.parameters, known=())
        await self._models.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: Any,  # noqa: ANN401, ARG002
    ) -> pb.RepositoryModelUnloadResponse:
        """Make a model refuse requests."""
        reject_unknown(request)
        self._check_repository(request.repository_name)
        _reject_parameters(request.parameters, known=("unload_dependents",))
        self._models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _check_repository(self, name: str) -> None:
        if name not in {"", self._models.name}:
            raise UnknownModelError(f"no repository {name[:300]!r}; there is {self._models.name!r}")


def _reject_parameters(parameters: Any, *, known: tuple[str, ...]) -> None:  # noqa: ANN401 - a map of messages
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise InvalidInputError(f"parameters.{unknown[0][:80]}", "set", "unknown here; models come from the repertoire")
