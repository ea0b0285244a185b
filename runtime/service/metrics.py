"""What Prometheus is told: calls as they end, requests as they end, and the engine's own counts when it is asked.

It knows nothing of ports: `exposition` is the text, whoever serves it.
Read first: nothing is counted per token; times of a request come from its `Usage` when it ends. Labels are bounded:
methods are those of the protos, tasks beyond `MAX_TASKS` are counted as "_other".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.engine.request import Failed, Finished, Located
from runtime.engine.statistics import EngineStatistics
from runtime.service.call import Call
from runtime.service.status import rule_for

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TASKS = 100
OTHER = "_other"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_TIER_COUNTS = (
    "hits",
    "misses",
    "loads",
    "evictions",
    "failures",
    "prefetch_useful_bytes",
    "prefetch_wasted_bytes",
    "demanded_bytes",
)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._started = Counter("grpc_server_started", "Calls begun.", _METHOD, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", (*_METHOD, "grpc_code"), registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Seconds of a call.", _METHOD, buckets=_SECONDS, registry=registry
        )

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"greenroom_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self._queue = seconds("queue", "From arrival until a request joined the running batch.")
        self._first_token = seconds("first_token", "From arrival to the first token.")
        self._inter_token = seconds("inter_token", "Between tokens, the mean of each request.")
        self._requests = Counter("greenroom_requests", "Requests ended.", ("outcome",), registry=registry)
        self._prompt_tokens = Counter("greenroom_prompt_tokens", "Of answered requests.", registry=registry)
        self._located = Counter("greenroom_located", "Routing decisions.", ("how", "task"), registry=registry)
        self._margin = Histogram(
            "greenroom_locator_margin",
            "Second-best score minus best.",
            buckets=(0.0, 0.01, 0.1, 0.5, 1, 5, 10, 50, 100, 1000),
            registry=registry,
        )
        self._tasks: set[str] = set()

    def watch_engine(self, statistics: Callable[[], EngineStatistics]) -> None:
        """Show an engine's counts from now on; asked at every exposition."""
        self._registry.register(_EngineCollector(statistics))

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format (`CONTENT_TYPE`); asks the engine, so not on an event loop."""
        return generate_latest(self._registry)

    def call_started(self, call: Call) -> None:
        """A call has come."""
        method = call.method
        self._started.labels(method.kind, method.service, method.name).inc()

    def call_ended(self, call: Call, seconds: float) -> None:
        """A call has ended with `call.code`."""
        method = call.method
        self._handled.labels(method.kind, method.service, method.name, call.code.name).inc()
        self._handling.labels(method.kind, method.service, method.name).observe(seconds)

    def located(self, event: Located) -> None:
        """A request has its mixture."""
        self._located.labels(event.how, self._task_label(event.task)).inc()
        if len(event.scores) > 1:
            self._margin.observe(event.margin)

    def ended(self, event: Finished | Failed) -> None:
        """A request has ended."""
        if isinstance(event, Failed):
            self._requests.labels(rule_for(event.error).code.name).inc()
            return
        usage = event.usage
        self._requests.labels(event.reason).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._queue.observe(usage.queue_s)
        if usage.completion_tokens:
            self._first_token.observe(usage.first_token_s)
        if usage.completion_tokens > 1:
            self._inter_token.observe((usage.total_s - usage.first_token_s) / (usage.completion_tokens - 1))

    def _task_label(self, task: str | None) -> str:
        if task is None or task in self._tasks:
            return task or ""
        if len(self._tasks) >= MAX_TASKS:
            return OTHER
        self._tasks.add(task)
        return task


class _EngineCollector:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, statistics: Callable[[], EngineStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each figure."""
        now = self._statistics()
        gauges = {
            "generation": ("Generation that new requests get.", now.generation),
            "running_sequences": ("The batch: sequences that hold KV cache.", now.running),
            "waiting_requests": ("Requests that wait to join the batch.", now.waiting),
            "kv_reserved_bytes": ("KV cache that running sequences may come to fill.", now.kv_bytes_reserved),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"greenroom_{name}", text, value=value)
        counters: dict[str, tuple[str, float]] = {
            "steps": ("Steps of the engine; tokens per step is the mean batch.", now.steps),
            "generated_tokens": ("Tokens generated.", now.tokens),
            "drafted_tokens": ("Tokens tried ahead of greedy answers.", now.drafted_tokens),
            "accepted_tokens": ("Of these, how many were right.", now.accepted_tokens),
            "graph_replays": ("Decode steps that were replayed from a recording.", now.graphs.replays),
            "graph_fallbacks": ("Decode steps that could not be, though steps are recorded.", now.graphs.fallbacks),
            "graph_captures": ("Recordings made of decode steps.", now.graphs.captures),
            "stall_seconds": ("Seconds in which sequences waited for experts.", now.stall_s),
        }
        for name, (text, count) in counters.items():
            yield CounterMetricFamily(f"greenroom_{name}", text, value=count)
        yield from self._tier("host", now)

    def _tier(self, tier: str, now: EngineStatistics) -> Iterator[Metric]:
        for name in ("budget_bytes", "resident_bytes", "reserved_bytes", "pinned_bytes"):
            gauge = GaugeMetricFamily(f"greenroom_expert_{name}", "Of expert memory.", labels=("tier",))
            gauge.add_metric([tier], getattr(now.memory, name))
            yield gauge
        for name in (*_TIER_COUNTS, "load_s", "bytes_read"):
            shown = {"load_s": "load_seconds", "bytes_read": "read_bytes"}.get(name, name)
            counter = CounterMetricFamily(f"greenroom_expert_{shown}", "Since the start.", labels=("tier",))
            counter.add_metric([tier], getattr(now.memory, name))
            yield counter
