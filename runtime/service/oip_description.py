"""What the Open Inference Protocol says of the server and its models: every function is pure.

It knows nothing of calls.
Read first: all models have the same tensors, those of `runtime.service.oip_tensors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenroom.pb.inference import grpc_service_pb2 as pb
from runtime.service.oip_tensors import OUTPUTS, TEXT_INPUT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.service.models import Model

NAME = "greenroom"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")
_TYPES = {"BYTES": pb.TYPE_STRING, "INT64": pb.TYPE_INT64}


def server(version: str) -> pb.ServerMetadataResponse:
    """Name, version, extensions."""
    return pb.ServerMetadataResponse(name=NAME, version=version, extensions=EXTENSIONS)


def metadata(model: Model) -> pb.ModelMetadataResponse:
    """Versions and tensors of a model."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=NAME,
        inputs=[tensor(name=TEXT_INPUT, datatype="BYTES", shape=[1])],
        outputs=[tensor(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in OUTPUTS.items()],
    )


def config(model: Model) -> pb.ModelConfigResponse:
    """The same as a configuration."""
    return pb.ModelConfigResponse(
        config=pb.ModelConfig(
            name=model.name,
            platform=NAME,
            backend=NAME,
            max_batch_size=0,
            input=[pb.ModelInput(name=TEXT_INPUT, data_type=pb.TYPE_STRING, dims=[1])],
            output=[
                pb.ModelOutput(name=name, data_type=_TYPES[kind], dims=dims) for name, (kind, dims) in OUTPUTS.items()
            ],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
    )


def index(models: Iterable[Model]) -> pb.RepositoryIndexResponse:
    """Models and their states."""
    entry = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(
        models=[entry(name=m.name, version=m.version, state=m.state, reason=m.reason) for m in models]
    )
