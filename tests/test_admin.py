"""The admin service over a real connection and the real engine: memory, generations, events, and who may come here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from repertoires import Workshop
from serving import Serving
from typer.testing import CliRunner

import greenroom
from greenroom import AdminClient, AdminEvent, Client
from greenroom.cli.main import app
from greenroom.cli.serve_config import load_config
from greenroom.cli.serve_parts import admin_services
from greenroom.pb.greenroom.v1 import admin_pb2, admin_pb2_grpc
from runtime.engine.engine import Engine
from runtime.engine.follower import HeadFollower
from runtime.errors import InvalidInputError
from runtime.service.admin_servicer import MAX_WATCHERS, AdminServicer
from runtime.service.admin_state import changes
from runtime.service.guard import Guard
from runtime.service.tokens import TokenEntry, Tokens, digest_of, new_secret

INFER, ADMIN = new_secret(), new_secret()


@pytest.fixture
def engine(three_tasks: Workshop, make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(three_tasks, start=False)


@pytest.fixture
def serving(engine: Engine, three_tasks: Workshop) -> Iterator[Serving]:
    entries = [
        TokenEntry(name="user", sha256=digest_of(INFER), scopes=["infer"]),
        TokenEntry(name="operator", sha256=digest_of(ADMIN), scopes=["admin"]),
    ]
    follower = HeadFollower(three_tasks.repertoire, engine, interval_s=1.0)
    servicer = AdminServicer(engine, follower, look_s=0.01)
    with Serving(engine, guard=Guard.of(Tokens(entries, [])), services=[servicer.service()]) as server:
        yield server


@pytest.fixture
def admin(serving: Serving) -> Iterator[AdminClient]:
    with AdminClient(serving.target, token=ADMIN, timeout_s=30.0) as client:
        yield client


def await_ready(admin: AdminClient, name: str) -> None:
    """Return once a task's experts are in memory, whole."""
    with closing(admin.watch(timeout_s=30.0)) as events:
        for event in events:
            if event.what == "loaded" and event.task is not None and event.task.task == name:
                return


def test_all_tasks_are_listed_with_where_they_stand(admin: AdminClient) -> None:
    tasks = admin.tasks()
    assert [task.task for task in tasks] == ["red", "green", "blue"]
    assert [task.num_visible for task in tasks] == [1, 2, 3]
    assert all((task.units, task.units_ready, task.resident_bytes) == (2, 0, 0) for task in tasks)
    assert all(len(task.digest) == 64 and task.set_bytes > 0 and not task.pinned for task in tasks)
    assert admin.task("green") == tasks[1]


def test_what_is_prefetched_is_in_memory_until_it_is_evicted(admin: AdminClient) -> None:
    admin.prefetch("red")
    await_ready(admin, "red")
    now = admin.task("red")
    assert (now.units_ready, now.references, now.pinned) == (2, 0, False)
    assert admin.evict("red") >= now.resident_bytes > 0  # its routers go too
    assert admin.task("red").units_ready == 0
    assert admin.evict("red") == 0


def test_what_is_pinned_stays_until_it_is_unpinned(admin: AdminClient) -> None:
    admin.pin("red")
    await_ready(admin, "red")
    now = admin.task("red")
    assert (now.pinned, now.references) == (True, 1)
    with pytest.raises(greenroom.InvalidRequestError, match="unpin it first"):
        admin.evict("red")
    assert not admin.unpin("red").pinned
    assert admin.evict("red") >= now.resident_bytes


@pytest.mark.parametrize("call", ["task", "prefetch", "pin", "unpin", "evict"])
def test_an_unknown_task_is_not_found_and_a_path_is_no_name(admin: AdminClient, call: str) -> None:
    with pytest.raises(greenroom.NotFoundError) as unknown:
        getattr(admin, call)("purple")
    assert unknown.value.reason == "UNKNOWN_TASK"
    for name in ("", "../red", "/etc/passwd", "x" * 129):
        with pytest.raises(greenroom.InvalidRequestError) as invalid:
            getattr(admin, call)(name)
        assert [violation.field for violation in invalid.value.field_violations] == ["task"]


def test_only_a_token_with_the_admin_scope_comes_here(serving: Serving) -> None:
    for token, kind in ((None, greenroom.UnauthenticatedError), (INFER, greenroom.PermissionDeniedError)):
        with AdminClient(serving.target, token=token) as client:
            for call in (
                client.tasks,
                lambda client=client: client.pin("red"),
                lambda client=client: client.rollback(expected=3, to=1),
                lambda client=client: next(client.watch()),
            ):
                with pytest.raises(kind):
                    call()


def test_a_field_that_the_server_does_not_know_is_refused(serving: Serving) -> None:
    newer = admin_pb2.TaskRequest.FromString(b"\x0a\x03red" + b"\xa0\x06\x01")
    with grpc.insecure_channel(serving.target) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Pin(newer, metadata=(("authorization", f"Bearer {ADMIN}"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("100=")


# ---- generations


def test_the_newest_generation_is_served_when_the_served_one_is_as_expected(
    admin: AdminClient, three_tasks: Workshop, engine: Engine
) -> None:
    three_tasks.publish("purple", "zzzz yyyy")
    with pytest.raises(greenroom.AbortedError) as caught:
        admin.publish(expected=2, generation=4)
    assert caught.value.reason == "GENERATION_MISMATCH"
    assert engine.generation.manifest.generation == 3
    admin.publish(expected=3, generation=4)
    assert [task.task for task in admin.tasks()] == ["red", "green", "blue", "purple"]


def test_of_two_who_publish_at_once_one_is_too_late(admin: AdminClient, three_tasks: Workshop) -> None:
    three_tasks.publish("purple", "zzzz yyyy")
    outcomes: list[str] = []

    def publish() -> None:
        try:
            admin.publish(expected=3, generation=4)
            outcomes.append("done")
        except greenroom.AbortedError:
            outcomes.append("aborted")

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["aborted"] * 3 + ["done"]


def test_a_rollback_is_served_at_once(admin: AdminClient, three_tasks: Workshop, engine: Engine) -> None:
    assert admin.rollback(expected=3, to=1) == 4
    assert three_tasks.repertoire.head() == engine.generation.manifest.generation == 4
    assert [task.task for task in admin.tasks()] == ["red"]
    with pytest.raises(greenroom.AbortedError):
        admin.rollback(expected=3, to=1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda admin: admin.publish(expected=0, generation=1), "expected_generation"),
        (lambda admin: admin.publish(expected=3, generation=0), "generation"),
        (lambda admin: admin.publish(expected=3, generation=3), "generation"),
        (lambda admin: admin.publish(expected=3, generation=2), "generation"),
        (lambda admin: admin.publish(expected=3, generation=9), "generation"),
        (lambda admin: admin.rollback(expected=3, to=0), "to_generation"),
        (lambda admin: admin.rollback(expected=3, to=3), "to"),
    ],
)
def test_a_generation_that_cannot_be_meant_is_refused(
    admin: AdminClient, change: Callable[[AdminClient], object], field: str
) -> None:
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        change(admin)
    assert [violation.field for violation in caught.value.field_violations] == [field]


# ---- events


def test_a_watcher_is_told_how_everything_stands_and_then_what_changes(
    admin: AdminClient, three_tasks: Workshop
) -> None:
    with closing(admin.watch(timeout_s=30.0)) as events:
        assert next(events) == AdminEvent(what="generation", generation=3)
        admin.pin("red")
        loaded = next(events)
        assert (loaded.what, loaded.task and loaded.task.task) == ("loaded", "red")
        admin.unpin("red")
        admin.evict("red")
        evicted = next(events)
        assert (evicted.what, evicted.task and evicted.task.task) == ("evicted", "red")
        three_tasks.publish("purple", "zzzz yyyy")
        admin.publish(expected=3, generation=4)
        assert next(events) == AdminEvent(what="generation", generation=4)


def test_a_watcher_hears_of_a_quarantine(admin: AdminClient, three_tasks: Workshop) -> None:
    digest = admin.task("blue").digest
    path = three_tasks.repertoire.blob_path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with closing(admin.watch(timeout_s=30.0)) as events:
        next(events)
        admin.prefetch("blue")
        hurt = next(event for event in events if event.what == "quarantined")
    assert hurt.task is not None
    assert (hurt.task.task, hurt.task.quarantine_reason) == ("blue", "DIGEST_MISMATCH")


def test_a_quarantine_that_is_over_is_told() -> None:
    bad = admin_pb2.TaskStatus(task="red", units=2, units_failed=1)
    good = admin_pb2.TaskStatus(task="red", units=2)
    (event,) = changes((1, {"red": bad}), (1, {"red": good}))
    assert event.released.task == "red"


def test_watchers_are_few_and_one_that_leaves_makes_room(serving: Serving, admin: AdminClient) -> None:
    watchers = [admin.watch(timeout_s=30.0) for _ in range(MAX_WATCHERS)]
    for watcher in watchers:
        next(watcher)
    with pytest.raises(greenroom.ExhaustedError):
        next(admin.watch(timeout_s=30.0))
    for watcher in watchers:
        watcher.close()


def test_a_drain_ends_watchers(serving: Serving, admin: AdminClient) -> None:
    events = admin.watch(timeout_s=30.0)
    next(events)
    stopping = serving.begin_stop()
    with pytest.raises(greenroom.UnavailableError):
        list(events)
    stopping.result(30)


# ---- configuration and commands


def test_administration_is_off_unless_configured_and_needs_tokens(tmp_path: Path) -> None:
    assert admin_services(load_config(None, {"repertoire": "r"}).server, None, None) == ()  # type: ignore[arg-type]
    for given in ({"admin": True}, {"signing_key": tmp_path}):
        with pytest.raises(InvalidInputError, match=r"server\."):
            admin_services(load_config(None, {"repertoire": "r", **given}).server, None, None)  # type: ignore[arg-type]


def test_without_the_service_nobody_finds_it(engine: Engine) -> None:
    entries = [TokenEntry(name="operator", sha256=digest_of(ADMIN), scopes=["admin"])]
    with (
        Serving(engine, guard=Guard.of(Tokens(entries, []))) as serving,
        AdminClient(serving.target, token=ADMIN) as client,
        pytest.raises(greenroom.GreenroomClientError) as caught,
    ):
        client.tasks()
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_the_commands_tell_how_a_server_gets_administration(engine: Engine) -> None:
    with Serving(engine) as serving:
        result = CliRunner().invoke(app, ["admin", "tasks", "--server", serving.target])
    assert result.exit_code != 0
    assert "has no administration: serve it with --admin" in f"{result.stderr}{result.exception}"


def test_the_commands_say_what_the_service_says(
    serving: Serving, admin: AdminClient, three_tasks: Workshop, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(ADMIN + "\n")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["admin", *arguments, "--server", serving.target, "--token-file", str(secret)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    listed = json.loads(run("tasks", "--json"))["tasks"]
    assert [task["task"] for task in listed] == ["red", "green", "blue"]
    assert run("pin", "red").startswith("red: ")
    await_ready(admin, "red")
    assert run("task", "red").startswith("red: 2 of 2 layers in memory, ")
    run("unpin", "red")
    assert run("evict", "red").endswith("bytes are free again\n")
    assert run("prefetch", "green").startswith("green: ")
    assert "generation 4 is served" in run("rollback", "--to", "1", "--expected", "3")
    three_tasks.publish("purple", "zzzz yyyy")
    assert run("publish", "5", "--expected", "4") == "generation 5 is served\n"


def test_a_command_takes_its_token_from_the_environment(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["admin", "tasks", "--server", serving.target]
    monkeypatch.delenv("GREENROOM_TOKEN", raising=False)
    assert "UNAUTHENTICATED" in CliRunner().invoke(app, arguments).stderr
    monkeypatch.setenv("GREENROOM_TOKEN", ADMIN)
    assert CliRunner().invoke(app, arguments).stdout.count("layers in memory") == 3


def test_an_administrator_may_not_ask_for_answers(serving: Serving) -> None:
    with Client(serving.target, token=ADMIN) as client, pytest.raises(greenroom.PermissionDeniedError):
        client.generate("x")
