"""Serving on Ray Serve: requests go where their experts are, a killed replica costs little, publishing reaches all."""

from __future__ import annotations

import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import openai
import pytest
from engines import until
from openai import OpenAI
from ray_engines import ByWords, build_noted, follow_fast, tiny_flags
from repertoires import Workshop

from greenroom import Client
from greenroom.client_errors import GreenroomClientError, InvalidRequestError, NotFoundError, UnavailableError
from runtime.scale.choice import Sent, choose
from runtime.scale.serve_app import ClusterOptions, run_application

ROOT = Path(__file__).parent.parent
TASKS = ("red", "green", "blue")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Two replicas on one machine."""

    def __init__(self, workshop: Workshop, base: Path, notes: Path) -> None:
        self.notes = notes
        self.flags = tiny_flags(workshop.repertoire.root, base, max_running=4)
        self.grpc_port, self.http_port = free_port(), free_port()

    def run(self, *, by_task: bool) -> None:
        run_application(
            partial(build_noted, self.flags, self.notes),
            partial(follow_fast, self.flags),
            ByWords,
            ClusterOptions(
                replicas=2,
                by_task=by_task,
                told_every_s=0.5,
                checked_every_s=0.5,
                grpc_port=self.grpc_port,
                http_port=self.http_port,
            ),
        )

    def get(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@pytest.fixture(params=[True])
def cluster(
    request: pytest.FixtureRequest, ray_address: str, three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path
) -> Iterator[Cluster]:
    from ray import serve

    assert ray_address, "this process is connected"
    notes = tmp_path / "notes"
    notes.mkdir()
    try:
        cluster = Cluster(three_tasks, tiny_base_folder, notes)
        cluster.run(by_task=request.param)
        yield cluster
    finally:
        serve.shutdown()


def test_a_cluster_routes_by_task_survives_a_killed_replica_and_takes_new_generations(
    cluster: Cluster, three_tasks: Workshop
) -> None:
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        assert _reads(client) == dict.fromkeys(TASKS, 1), "by one replica, and not by both"
        _answers_are_those_of_one_engine(client, three_tasks)
        _errors_keep_their_status(client)
        _http_answers_as_one_machine_does(cluster)
        three_tasks.publish("gold", "zz yy xx", rank=4)
        until(lambda: all(_knows(client, "gold") for _ in range(6)), seconds=60.0)
        _a_killed_replica_costs_only_unavailable(cluster, client)


@pytest.mark.parametrize("cluster", [False], indirect=True)
def test_taking_turns_reads_the_same_experts_in_both_replicas(cluster: Cluster) -> None:
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        assert sum(_reads(client).values()) > len(TASKS), "routing by task reads each once"


def _reads(client: Client) -> dict[str, int]:
    """How many of some requests, one after the other, read experts from disk; per task."""
    reads = dict.fromkeys(TASKS, 0)
    for task in TASKS * 4:
        answer = client.generate(f"{task} x", task=task, max_tokens=2)
        reads[task] += any(use.bytes_read for use in answer.routing.experts)
    return reads


def _answers_are_those_of_one_engine(client: Client, workshop: Workshop) -> None:
    text = "aaaa bbbb cccc"
    tokens = workshop.reference(text, "red", 4).argmax(1).tolist()
    answer = client.generate(text, max_tokens=4, ignore_eos=True)
    assert (answer.text, answer.routing.task) == (workshop.base.tokenizer.decode(tokens), "red")


def _errors_keep_their_status(client: Client) -> None:
    with pytest.raises(NotFoundError, match="UNKNOWN_TASK: "):
        client.generate("x", task="purple")
    with pytest.raises(InvalidRequestError, match="temperature"):
        client.generate("x", temperature=99.0)


def _http_answers_as_one_machine_does(cluster: Cluster) -> None:
    with OpenAI(base_url=f"http://127.0.0.1:{cluster.http_port}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "greenroom:red", "prompt": "aaaa", "max_tokens": 3}
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        assert len(chunks) > 3, "tokens come as they are made"
        assert {model.id for model in client.models.list()} == {"greenroom", *(f"greenroom:{task}" for task in TASKS)}
        located = client.chat.completions.create(model="greenroom", messages=[{"role": "user", "content": "aaaa"}], n=2)
        assert len(located.choices) == 2
        with pytest.raises(openai.NotFoundError, match="purple"):
            client.completions.create(model="greenroom:purple", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="greenroom", prompt="x", temperature=99)
    assert cluster.get("/metrics") == 404, "each replica has its own"
    assert cluster.get("/ready") == 200


def _knows(client: Client, task: str) -> bool:
    try:
        return client.generate("x", task=task, max_tokens=1).routing.task == task
    except GreenroomClientError:
        return False


def _a_killed_replica_costs_only_unavailable(cluster: Cluster, client: Client) -> None:
    failures: list[Exception] = []
    answers: list[str] = []
    stopping = threading.Event()

    def ask(task: str) -> None:
        while not stopping.is_set():
            try:
                answers.append(client.generate(f"{task} x", task=task, max_tokens=16, ignore_eos=True).text)
            except Exception as error:  # noqa: BLE001 - judged below
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    until(lambda: len(answers) > 6, seconds=60.0)
    living = [int(note.name) for note in cluster.notes.iterdir() if Path(f"/proc/{note.name}").exists()]
    os.kill(living[0], signal.SIGKILL)
    known = len(living)
    until(lambda: len(list(cluster.notes.iterdir())) > known, seconds=60.0)
    before = len(answers)
    until(lambda: len(answers) > before + 10, seconds=60.0)
    stopping.set()
    for thread in threads:
        thread.join(60)
    assert {type(error) for error in failures} <= {UnavailableError}
    assert [client.generate(f"{task} x", task=task, max_tokens=1).routing.task for task in TASKS] == list(TASKS)


def test_a_request_goes_home_unless_home_is_much_busier() -> None:
    waiting = {"a": 3, "b": 1, "c": 2}
    assert choose({"a"}, waiting, spread=4) == ["a", "b", "c"]
    assert choose({"a"}, waiting, spread=2) == ["b", "c", "a"]
    assert choose({"a", "c"}, waiting, spread=4) == ["c", "b", "a"]
    assert choose({"gone"}, waiting, spread=4) == ["b", "c", "a"]
    assert choose({"a"}, {}, spread=4) == []


def test_what_was_sent_is_remembered_until_the_replica_says_otherwise() -> None:
    sent = Sent(limit=2)
    sent.add("red", "a")
    sent.add("red", "b")
    sent.add("green", "a")
    assert sent.homes("red") == {"a", "b"}
    sent.correct("a", ["green"])
    assert (sent.homes("red"), sent.homes("green")) == ({"b"}, {"a"})
    sent.add("blue", "a")
    assert sent.homes("red") == frozenset()
