"""A server's life and the ends that requests can come to: ready, cancelled, too late, drained, killed.

It does not know models: the engine plays a script.
Read first: `hold ...` keeps a request running until the test releases it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_engine import ScriptedEngine
from serving import LIMIT_S, Serving

import greenroom
from greenroom import AsyncClient, Client, Delta, Done
from runtime.engine.request import Request
from runtime.errors import InvalidInputError, UnavailableError
from runtime.service.answers import Answers
from runtime.service.lifecycle import serve_until_signal
from runtime.service.server import Server, State

ROOT = Path(__file__).parents[1]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    with Serving(engine) as server:
        yield server


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    with Client(serving.target, timeout_s=LIMIT_S) as connected:
        yield connected


def test_closing_a_stream_early_cancels_the_request_once(client: Client, engine: ScriptedEngine) -> None:
    with closing(client.stream("hold on", request_id="r1")) as stream:
        next(stream)
        engine.wait_live(1)
    engine.wait_live(0)
    assert engine.cancelled == ["r1"]


def test_closing_an_async_stream_early_cancels_the_request_once(serving: Serving, engine: ScriptedEngine) -> None:
    async def peek() -> None:
        async with AsyncClient(serving.target) as client, aclosing(client.stream("hold", request_id="r1")) as stream:
            await anext(stream)

    asyncio.run(peek())
    engine.wait_live(0)
    assert engine.cancelled == ["r1"]


def test_cancelling_the_task_that_asks_cancels_the_request(serving: Serving, engine: ScriptedEngine) -> None:
    async def give_up() -> None:
        async with AsyncClient(serving.target) as client:
            task = asyncio.create_task(client.generate("hold", request_id="r1"))
            await asyncio.to_thread(engine.wait_live, 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    engine.wait_live(0)
    assert engine.cancelled == ["r1"]


def test_a_client_that_goes_away_cancels_its_request(serving: Serving, engine: ScriptedEngine) -> None:
    gone = Client(serving.target)
    stream = gone.stream("hold on", request_id="r1")
    next(stream)
    gone.close()
    engine.wait_live(0)
    assert engine.cancelled == ["r1"]


def test_a_request_left_while_it_is_submitted_is_cancelled_once_it_is(engine: ScriptedEngine) -> None:
    async def leave() -> None:
        async with Answers(engine, num_threads=1).open(Request(request_id="r1", text="hold")) as stream:
            await anext(stream)

    async def main() -> None:
        engine.start()
        engine.may_submit.clear()
        leaving = asyncio.create_task(leave())
        await asyncio.to_thread(engine.submitting.wait, LIMIT_S)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not engine.cancelled
        engine.may_submit.set()
        await asyncio.to_thread(engine.wait_cancelled)

    asyncio.run(main())
    engine.wait_live(0)
    assert engine.cancelled == ["r1"]


def test_a_request_that_the_engine_refuses_is_not_cancelled(engine: ScriptedEngine) -> None:
    async def refused() -> None:
        answers = Answers(engine, num_threads=1)
        with pytest.raises(UnavailableError):
            async with answers.open(Request(request_id="r1", text="x")):
                pass
        answers.close()

    asyncio.run(refused())
    assert not engine.cancelled


def test_an_answered_request_is_not_cancelled(client: Client, engine: ScriptedEngine) -> None:
    client.generate("text")
    client.locate("text")
    assert not engine.cancelled


def test_a_deadline_reaches_the_engine_and_ends_the_request(client: Client, engine: ScriptedEngine) -> None:
    before = time.monotonic()
    with pytest.raises(greenroom.DeadlineExceededError) as caught:
        client.generate("hold", request_id="r1", timeout_s=0.3)
    engine.wait_live(0)
    (request,) = engine.requests
    assert request.deadline is not None
    assert before < request.deadline < before + 0.4
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert engine.cancelled == ["r1"]


def test_a_deadline_of_a_millisecond_is_its_own_status(client: Client) -> None:
    client.describe()
    with pytest.raises(greenroom.DeadlineExceededError):
        client.generate("hold", timeout_s=0.001)


def test_a_slow_submission_does_not_keep_others_waiting(client: Client, engine: ScriptedEngine) -> None:
    engine.may_submit.clear()
    with pytest.raises(greenroom.DeadlineExceededError):
        client.generate("text", timeout_s=0.2)
    assert client.health()
    assert client.describe().generation == 3
    engine.may_submit.set()


def whole_server_health(target: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    with grpc.insecure_channel(target) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="")).status


def test_health_says_no_until_the_engine_has_started(engine: ScriptedEngine) -> None:
    engine.may_start.clear()
    with Serving(engine, until_ready=False) as serving, Client(serving.target) as client:
        assert not client.health()
        assert whole_server_health(serving.target) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert serving.server.state is State.STARTING
        with pytest.raises(greenroom.UnavailableError):
            client.generate("text")
        engine.may_start.set()
        serving.wait_ready()
        assert client.health()
        assert client.generate("text").text == "text"
        assert whole_server_health(serving.target) == health_pb2.HealthCheckResponse.SERVING


def test_health_of_no_server_is_no() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.health()


def test_a_drain_lets_running_requests_finish_and_refuses_new_ones(
    client: Client, serving: Serving, engine: ScriptedEngine
) -> None:
    stream = client.stream("hold to the end")
    next(stream)
    stopping = serving.begin_stop()
    engine.wait_refusing()
    with pytest.raises(greenroom.UnavailableError) as caught:
        client.generate("text")
    assert (caught.value.reason, caught.value.message) == ("UNAVAILABLE", "draining")
    assert not client.health()
    engine.release()
    *deltas, last = stream
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == "hold to the end"
    assert isinstance(last, Done)
    stopping.result(LIMIT_S)
    assert serving.server.state is State.STOPPED
    assert engine.closed == 0


def test_a_drain_cuts_what_is_still_running_at_the_end_of_the_grace_time(engine: ScriptedEngine) -> None:
    with Serving(engine, grace_s=0.2) as serving, Client(serving.target) as client:
        stream = client.stream("hold")
        next(stream)
        serving.begin_stop().result(LIMIT_S)
        with pytest.raises(greenroom.UnavailableError):
            list(stream)


def test_stopping_twice_is_stopping_once(serving: Serving) -> None:
    first, second = serving.begin_stop(), serving.begin_stop()
    first.result(LIMIT_S)
    second.result(LIMIT_S)
    assert serving.server.state is State.STOPPED


def test_a_server_stopped_while_it_starts_is_never_ready(engine: ScriptedEngine) -> None:
    async def stop_early() -> None:
        engine.may_start.clear()
        server = Server(engine, host="127.0.0.1", port=0, grace_s=1.0)
        await server.start()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        engine.may_start.set()
        with pytest.raises(UnavailableError):
            await server.wait_ready()
        await stopping

    asyncio.run(stop_early())


def test_a_port_in_use_is_refused(serving: Serving) -> None:
    async def bind() -> None:
        await Server(ScriptedEngine(), host="127.0.0.1", port=int(serving.target.split(":")[1]), grace_s=0).start()

    with pytest.raises(InvalidInputError, match="port="):
        asyncio.run(bind())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(engine: ScriptedEngine, number: signal.Signals) -> None:
    server = Server(engine, host="127.0.0.1", port=0, grace_s=1.0)
    asyncio.run(serve_until_signal(server, on_ready=lambda _port: os.kill(os.getpid(), number)))
    assert server.state is State.STOPPED


SERVE = """
import sys
sys.path.insert(0, "tests")
import asyncio
from runtime.service.lifecycle import serve_until_signal
from runtime.service.server import Server
from scripted_engine import ScriptedEngine
server = Server(ScriptedEngine(), host="127.0.0.1", port=0, grace_s=5.0)
asyncio.run(serve_until_signal(server, on_ready=lambda port: print(port, flush=True)))
"""


def test_a_server_killed_in_mid_stream_is_unavailable_to_its_client() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with Client(f"127.0.0.1:{process.stdout.readline().strip()}", timeout_s=LIMIT_S) as client:
            stream = client.stream("hold")
            next(stream)
            process.kill()
            with pytest.raises(greenroom.UnavailableError) as caught:
                list(stream)
    assert caught.value.reason == "UNAVAILABLE"
