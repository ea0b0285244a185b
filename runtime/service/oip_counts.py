"""What the Open Inference Protocol counts of each model.

It knows nothing of how requests are answered.
Read first: only models that exist are counted, so there are never more counts than tasks; on the event loop only.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from greenroom.pb.inference import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.engine.request import Usage
    from runtime.service.models import Model


@dataclass
class Measured:
    """One request while it is answered; `usage` is filled in when it ends well."""

    usage: Usage | None = None


class Counts:
    """Counts since the server started."""

    def __init__(self) -> None:
        self._statistics: dict[str, pb.ModelStatistics] = {}

    def of(self, model: Model) -> pb.ModelStatistics:
        """A copy of what is counted of a model."""
        statistics = pb.ModelStatistics()
        statistics.CopyFrom(self._statistics.get(model.name, pb.ModelStatistics(name=model.name)))
        statistics.version = model.version
        return statistics

    @contextmanager
    def measure(self, model: Model) -> Iterator[Measured]:
        """Count one request; it failed unless its usage is known at the end."""
        statistics = self._statistics.setdefault(model.name, pb.ModelStatistics(name=model.name))
        statistics.last_inference = time.time_ns() // 1_000_000
        started_ns = time.monotonic_ns()
        measured = Measured()
        try:
            yield measured
        finally:
            inference, usage = statistics.inference_stats, measured.usage
            if usage is None:
                _add(inference.fail, (time.monotonic_ns() - started_ns) / 1e9)
            else:
                statistics.inference_count += 1
                statistics.execution_count += 1
                _add(inference.success, usage.total_s)
                _add(inference.queue, usage.queue_s)
                _add(inference.compute_input, usage.first_token_s - usage.queue_s)
                _add(inference.compute_infer, usage.total_s - usage.first_token_s)


def _add(duration: pb.StatisticDuration, seconds: float) -> None:
    duration.count += 1
    duration.ns += max(0, round(seconds * 1e9))
