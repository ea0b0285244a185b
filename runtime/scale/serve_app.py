"""The application on Ray Serve: replicas with an engine each behind one entry for gRPC and HTTP.

It knows nothing of the command line.
Read first: scheduling, discovery, restarts, scaling and the calls between processes are Serve's. Ours is what runs in
its actors, and the order in which its router tries replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidInputError
from runtime.scale.choice import SPREAD
from runtime.scale.cluster import ray_module
from runtime.scale.entry import Entry, TaskOf
from runtime.scale.replica import Follower, Replica

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

APPLICATION = "greenroom"
REPLICA = "Replica"
_ADD_SERVICER = "greenroom.pb.greenroom.v1.greenroom_pb2_grpc.add_GreenroomServicer_to_server"
_ROUTER = "runtime.scale.expert_router.ExpertRouter"


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How an application runs.

    Args:
        replicas: engines, where nothing scales them.
        autoscaling: settings of Serve's `AutoscalingConfig`, passed through; empty for a fixed number of replicas.
        max_ongoing: requests that a replica has at once; more wait at the entry.
        num_cpus: of each replica.
        num_gpus: of each replica.
        spread: see `runtime.scale.choice.SPREAD`.
        by_task: False takes turns instead of routing by task, for comparison.
        told_every_s: seconds between a replica's reports of what it holds.
        checked_every_s: seconds between looks whether a replica lives; one that does not is replaced.
        grpc_port: of the entry.
        http_host: of the entry.
        http_port: of the entry.
    """

    replicas: int = 1
    autoscaling: Mapping[str, float] = field(default_factory=dict)
    max_ongoing: int = 64
    num_cpus: float = 1
    num_gpus: float = 0
    spread: int = SPREAD
    by_task: bool = True
    told_every_s: float = 1.0
    checked_every_s: float = 2.0
    grpc_port: int = 50051
    http_host: str = "127.0.0.1"
    http_port: int = 8000


def run_application(
    build: Callable[[], Engine],
    follow: Callable[[Engine], Follower],
    make_locator: Callable[[], TaskOf],
    options: ClusterOptions,
) -> Any:  # noqa: ANN401 - Ray's handle
    """Start the application on the connected cluster, and return when it takes requests.

    Args:
        build: makes an engine in a replica; sent there by its module's name, as are the others.
        follow: makes what follows the repertoire's HEAD there.
        make_locator: makes the entry's locator.
        options: see there.

    Returns:
        the entry's handle.

    Raises:
        InvalidInputError: a setting that Serve does not take, or Ray is not installed.
    """
    ray_module()
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig, gRPCOptions

    router = RequestRouterConfig(
        request_router_class=_ROUTER,
        request_router_kwargs={"spread": options.spread, "by_task": options.by_task},
        request_routing_stats_period_s=options.told_every_s,
    )
    try:
        number: dict[str, Any] = (
            {"autoscaling_config": AutoscalingConfig(**options.autoscaling)}
            if options.autoscaling
            else {"num_replicas": options.replicas}
        )
    except (TypeError, ValueError) as error:
        raise InvalidInputError("autoscaling", dict(options.autoscaling), str(error)) from error
    serve.start(
        http_options={"host": options.http_host, "port": options.http_port},
        grpc_options=gRPCOptions(port=options.grpc_port, grpc_servicer_functions=[_ADD_SERVICER]),
    )
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        max_ongoing_requests=options.max_ongoing,
        health_check_period_s=options.checked_every_s,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        request_router_config=router,
        **number,
    )
    entry = serve.deployment(Entry, name="Entry", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    application = entry.bind(replica.bind(build, follow), make_locator)
    return serve.run(application, name=APPLICATION, route_prefix="/")
