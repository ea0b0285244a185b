"""OpenTelemetry: a span for every call, and below it one for each stage of its request.

It needs the extra `otel`; nothing imports it unless traces are configured.
Read first: stages are told when the request has ended, from the times in its `Usage`, so tokens cost nothing. Stages:
queue (until the batch), locate (base layers and the decision), load (experts), prefill (beside load), decode.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from runtime.engine.request import Failed, Finished, Usage
from runtime.service.call import Call

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 1_000_000_000


class Tracing:
    """Makes spans.

    Args:
        tracer: of an OpenTelemetry provider, which its maker shuts down.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, call: Call) -> Iterator[None]:
        """The span of a call, a child of the caller's if that sent one; it is the current one within the block."""
        parent = self._propagator.extract(dict(call.metadata))
        attributes = {"rpc.system": "grpc", "rpc.service": call.method.service, "rpc.method": call.method.name}
        with self._tracer.start_as_current_span(
            str(call.method).removeprefix("/"),
            parent,
            kind=trace.SpanKind.SERVER,
            attributes={**attributes, "greenroom.request_id": call.request_id},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
            try:
                yield
            finally:
                span.set_attribute("rpc.grpc.status_code", call.code.value[0])
                if call.code is not grpc.StatusCode.OK:
                    span.set_status(trace.StatusCode.ERROR, call.code.name)

    def current(self) -> trace.Span:
        """The span of the call that the current task serves."""
        return trace.get_current_span()

    def stages(self, parent: trace.Span, event: Finished | Failed) -> None:
        """The stages of a request that has ended now, as children of `parent`."""
        usage = event.usage
        if usage is None:
            return
        began_ns = time.time_ns() - int(usage.total_s * _NS)
        context = trace.set_span_in_context(parent)
        for name, from_s, to_s in stage_times(usage):
            span = self._tracer.start_span(name, context, start_time=began_ns + int(from_s * _NS))
            span.end(began_ns + int(to_s * _NS))


def stage_times(usage: Usage) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of every stage that a request came to, in seconds since it was submitted.

    All but `load` meet end to end; `load` runs beside `prefill`, and only where experts were needed.
    """
    began_s = 0.0
    for name, ended_s in (("queue", usage.queue_s), ("locate", usage.located_s), ("prefill", usage.first_token_s)):
        yield name, began_s, ended_s or usage.total_s
        if not ended_s:
            return
        began_s = ended_s
        if name == "locate" and usage.load_s:
            yield "load", ended_s, ended_s + usage.load_s
    yield "decode", began_s, usage.total_s


@contextmanager
def exporting(exporter: SpanExporter) -> Iterator[Tracing]:
    """Tracing whose spans go to `exporter` in batches, on a thread of their own; the rest goes when the block ends."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "greenroom"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield Tracing(provider.get_tracer("greenroom"))
    finally:
        provider.shutdown()
