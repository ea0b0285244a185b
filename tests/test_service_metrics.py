"""What is told of calls besides their answers: metrics, log lines, spans."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest
from engines import ask
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from repertoires import Workshop
from scripted_engine import MEMORY, ScriptedEngine
from serving import Serving

import greenroom
from greenroom import Client
from runtime.engine.engine import Engine
from runtime.engine.request import Failed, Finished, Located, TaskScore, Usage
from runtime.errors import QueueFullError, UnknownTaskError
from runtime.service.call import CALL, Call, Method
from runtime.service.guard import Guard
from runtime.service.identity import trace_id_of
from runtime.service.logs import JsonLines
from runtime.service.metrics import MAX_TASKS, OTHER, Metrics
from runtime.service.tracing import exporting, stage_times

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def samples(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by name and label values, labels in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture
def guard() -> Guard:
    return Guard()


@pytest.fixture
def client(guard: Guard) -> Iterator[Client]:
    with Serving(ScriptedEngine(), guard=guard) as serving, Client(serving.target) as connected:
        yield connected


def test_calls_are_counted_by_method_and_status(guard: Guard) -> None:
    engine = ScriptedEngine({"task": UnknownTaskError("none")})
    with Serving(engine, guard=guard) as serving, Client(serving.target) as client:
        client.generate("one two")
        client.locate("x")
        with pytest.raises(greenroom.NotFoundError):
            client.generate("refuse task")
    now = samples(guard.metrics)
    generate = ("Generate", "greenroom.v1.Greenroom", "server_stream")
    assert now["grpc_server_started_total"][generate] == 2
    assert now["grpc_server_handled_total"]["OK", *generate] == 1
    assert now["grpc_server_handled_total"]["NOT_FOUND", *generate] == 1
    assert now["grpc_server_handled_total"]["OK", "Locate", "greenroom.v1.Greenroom", "unary"] == 1
    assert now["grpc_server_handling_seconds_count"][generate] == 2


def test_requests_are_counted_by_outcome_with_their_times(client: Client, guard: Guard) -> None:
    client.generate("one two three")
    now = samples(guard.metrics)
    assert now["greenroom_requests_total"] == {("stop",): 1}
    assert now["greenroom_located_total"] == {("located", "orders"): 1}
    assert now["greenroom_locator_margin_sum"][()] == 0.125
    assert now["greenroom_queue_seconds_sum"][()] == 0.5
    assert now["greenroom_first_token_seconds_sum"][()] == 0.75
    assert now["greenroom_inter_token_seconds_sum"][()] == pytest.approx((2.5 - 0.75) / 2)
    assert now["greenroom_prompt_tokens_total"][()] == 7


def test_the_engines_counts_are_read_when_they_are_asked_for() -> None:
    engine, metrics = ScriptedEngine(), Metrics()
    metrics.watch_engine(engine.statistics)
    now = samples(metrics)
    assert now["greenroom_running_sequences"][()] == 0
    assert (now["greenroom_generation"][()], now["greenroom_steps_total"][()]) == (3, 2)
    assert (now["greenroom_drafted_tokens_total"][()], now["greenroom_accepted_tokens_total"][()]) == (5, 4)
    graphs = [now[f"greenroom_graph_{name}_total"][()] for name in ("replays", "fallbacks", "captures")]
    assert graphs == [7, 6, 5]
    assert now["greenroom_expert_resident_bytes"][("host",)] == MEMORY.resident_bytes
    assert now["greenroom_expert_load_seconds_total"][("host",)] == MEMORY.load_s
    for name in ("hits", "misses", "loads", "evictions", "prefetch_useful_bytes", "prefetch_wasted_bytes"):
        assert now[f"greenroom_expert_{name}_total"][("host",)] == getattr(MEMORY, name)


def test_the_number_of_task_labels_is_bounded() -> None:
    metrics = Metrics()
    for number in range(MAX_TASKS + 7):
        metrics.located(Located(task=f"t{number}", how="pinned", margin=0, scores=(), generation=1, experts=()))
    counts = samples(metrics)["greenroom_located_total"]
    assert len(counts) == MAX_TASKS + 1
    assert counts["pinned", OTHER] == 7  # how, task


def test_a_margin_is_only_seen_where_two_tasks_were_scored() -> None:
    metrics = Metrics()
    for scores in ((), (TaskScore("a", 1.0),)):
        metrics.located(Located(task="a", how="located", margin=0, scores=scores, generation=1, experts=()))
    assert samples(metrics)["greenroom_locator_margin_count"][()] == 0


def test_a_failed_request_is_counted_by_its_status() -> None:
    metrics = Metrics()
    metrics.ended(Failed(QueueFullError("full")))
    assert samples(metrics)["greenroom_requests_total"] == {("RESOURCE_EXHAUSTED",): 1}


# ---- logs


def record(**extra: object) -> logging.LogRecord:
    made = logging.LogRecord("greenroom.access", logging.INFO, "file", 1, "%s done", ("x",), None)
    vars(made).update(extra)
    return made


def test_a_log_line_is_json_with_the_request_it_is_about() -> None:
    call = Call(method=Method("s", "m", "unary"), message=None, metadata={}, peer="p", remaining_s=None)
    call.request_id, call.trace_id = "r1", TRACE
    token = CALL.set(call)
    try:
        line = json.loads(JsonLines().format(record(fields={"code": "OK"})))
    finally:
        CALL.reset(token)
    assert {key: line[key] for key in ("level", "logger", "message", "request_id", "trace_id", "code")} == {
        "level": "INFO",
        "logger": "greenroom.access",
        "message": "x done",
        "request_id": "r1",
        "trace_id": TRACE,
        "code": "OK",
    }


def test_a_log_line_keeps_the_exception_and_stays_one_line() -> None:
    text = JsonLines().format(record(exc_info=(ValueError, ValueError("two\nlines"), None)))
    assert "\n" not in text
    assert "ValueError" in json.loads(text)["exception"]


def test_an_access_line_names_the_callers_trace(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, made: logging.LogRecord) -> None:
            seen.append(json.loads(JsonLines().format(made)))

    keep = Keep()
    log = logging.getLogger("greenroom.access")
    log.addHandler(keep)
    try:
        with caplog.at_level(logging.INFO, "greenroom.access"), Serving(ScriptedEngine(), guard=guard) as serving:
            describe(serving.target, PARENT)
    finally:
        log.removeHandler(keep)
    (line,) = seen
    assert (line["trace_id"], line["code"], line["method"]) == (TRACE, "OK", "/greenroom.v1.Greenroom/Describe")


def describe(target: str, traceparent: str) -> None:
    import grpc

    from greenroom.pb.greenroom.v1 import greenroom_pb2, greenroom_pb2_grpc

    with grpc.insecure_channel(target) as channel:
        stub = greenroom_pb2_grpc.GreenroomStub(channel)
        stub.Describe(greenroom_pb2.DescribeRequest(), metadata=(("traceparent", traceparent),))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        PARENT + "-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
    ],
)
def test_a_header_that_is_no_trace_parent_is_ignored(header: str) -> None:
    assert trace_id_of(header) == ""


def test_a_trace_parent_of_a_later_version_is_taken() -> None:
    assert trace_id_of(PARENT) == trace_id_of(f"01-{TRACE}-{SPAN}-01-more") == TRACE


# ---- spans


def test_every_call_is_a_span_with_its_stages_below_it(
    three_tasks: Workshop, make_engine: Callable[..., Engine], prototypes: dict[str, str]
) -> None:
    exporter = InMemorySpanExporter()
    engine = make_engine(three_tasks, start=False)
    with exporting(exporter) as tracing:
        with Serving(engine, guard=Guard(tracing=tracing)) as serving, Client(serving.target) as client:
            client.generate(prototypes["red"], max_tokens=3, ignore_eos=True, request_id="r1")
            describe(serving.target, PARENT)
        tracing.current()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans["greenroom.v1.Greenroom/Generate"]
    assert root.attributes is not None
    assert root.attributes["greenroom.request_id"] == "r1"
    assert spans["load"].start_time == spans["prefill"].start_time
    stages = [spans[name] for name in ("queue", "locate", "prefill", "decode")]
    assert all(stage.parent is not None and stage.parent.span_id == root.context.span_id for stage in stages)
    assert [stage.end_time for stage in stages[:-1]] == [stage.start_time for stage in stages[1:]]
    assert all(duration(stage) >= 0 for stage in stages)
    child = spans["greenroom.v1.Greenroom/Describe"]
    assert (f"{child.context.trace_id:032x}", f"{child.parent.span_id:016x}") == (TRACE, SPAN)  # type: ignore[union-attr]


def duration(span: ReadableSpan) -> int:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.end_time - span.start_time


def test_a_call_that_fails_is_a_span_with_its_status() -> None:
    exporter = InMemorySpanExporter()
    with exporting(exporter) as tracing:
        engine = ScriptedEngine({"task": UnknownTaskError("none")})
        with (
            Serving(engine, guard=Guard(tracing=tracing)) as serving,
            Client(serving.target) as client,
            pytest.raises(greenroom.NotFoundError),
        ):
            client.generate("refuse task")
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes["rpc.grpc.status_code"], span.status.description) == (5, "NOT_FOUND")


def usage(**times: float) -> Usage:
    zero = {"queue_s": 0.0, "located_s": 0.0, "load_s": 0.0, "first_token_s": 0.0, "total_s": 5.0}
    return Usage(prompt_tokens=1, completion_tokens=1, **(zero | times))


def test_the_stages_of_a_request_meet_end_to_end() -> None:
    times = usage(queue_s=1.0, located_s=2.0, load_s=0.5, first_token_s=4.0)
    assert list(stage_times(times)) == [
        ("queue", 0.0, 1.0),
        ("locate", 1.0, 2.0),
        ("load", 2.0, 2.5),
        ("prefill", 2.0, 4.0),
        ("decode", 4.0, 5.0),
    ]


def test_the_stage_that_a_request_ended_in_is_the_last() -> None:
    assert list(stage_times(usage(queue_s=1.0, located_s=2.0))) == [
        ("queue", 0.0, 1.0),
        ("locate", 1.0, 2.0),
        ("prefill", 2.0, 5.0),
    ]


def test_the_engine_says_when_each_stage_ended(
    three_tasks: Workshop, make_engine: Callable[..., Engine], prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    done = ask(engine, prototypes["red"], max_tokens=2).wait().finished
    assert isinstance(done, Finished)
    times = done.usage
    assert 0 <= times.queue_s <= times.located_s <= times.first_token_s <= times.total_s
    assert 0 < times.load_s <= times.first_token_s
    failed = ask(engine, prototypes["red"], max_tokens=100_000, deadline=None, task="red")
    engine.cancel(failed.request_id)
    last = failed.wait().events[-1]
    assert isinstance(last, Failed | Finished)
    assert last.usage is not None
    assert last.usage.prompt_tokens > 0
