"""The service over the real engine on the tiny base: the two agree on words, errors and ends.

It does not know whether answers are right: `test_engine.py` does.
Read first: the engine's fixture checks for leaks when the test ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from engines import ask
from repertoires import Workshop
from serving import Serving

import greenroom
from greenroom import AsyncClient, Client
from runtime.engine.engine import Engine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def engine(three_tasks: Workshop, make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(three_tasks, start=False)


@pytest.fixture
def serving(engine: Engine) -> Iterator[Serving]:
    with Serving(engine) as server:
        yield server


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    with Client(serving.target, timeout_s=60.0) as connected:
        yield connected


def test_answers_over_the_wire_are_the_engines_own(client: Client, engine: Engine, prototypes: dict[str, str]) -> None:
    for task, text in prototypes.items():
        remote = client.generate(text, max_tokens=6, ignore_eos=True)
        local = ask(engine, text, max_tokens=6).wait()
        assert (list(remote.token_ids), remote.text) == (local.tokens, local.text)
        assert (remote.routing.task, remote.routing.how, remote.finish_reason) == (task, "located", "length")
        assert remote.usage.completion_tokens == 6
        assert remote.routing.experts


def test_all_choices_come_over_the_wire_with_their_log_probabilities(client: Client, engine: Engine) -> None:
    options = {"temperature": 1.5, "seed": 3, "n": 3, "logprobs": 2}
    remote = client.generate("hello", max_tokens=6, ignore_eos=True, **options)  # type: ignore[arg-type]
    local = ask(engine, "hello", max_tokens=6, keep_logits=False, sampling=options).wait()
    assert [choice.text for choice in remote.choices] == [local.choice_text(number) for number in range(3)]
    assert len({choice.token_ids for choice in remote.choices}) > 1
    assert remote.usage.completion_tokens == 18
    for choice in remote.choices:
        assert choice.finish_reason == "length"
        assert [item.chosen.token_id for item in choice.logprobs] == list(choice.token_ids)
        assert all(len(item.top) == 2 and item.top[0].logprob >= item.chosen.logprob for item in choice.logprobs)
    assert (remote.text, remote.token_ids) == (remote.choices[0].text, remote.choices[0].token_ids)


def test_an_answer_over_the_wire_follows_its_constraint(client: Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = client.generate("hello", max_tokens=60, json_schema={**schema, "additionalProperties": False})
    assert isinstance(json.loads(answer.text)["ok"], bool)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("sampling.json_schema", {"json_schema": {"type": "strin"}}),
        ("sampling.regex", {"regex": "("}),
        ("sampling.n", {"n": 16}),
    ],
)
def test_what_only_the_engine_can_refuse_is_refused_by_its_field(
    three_tasks: Workshop, make_engine: Callable[..., Engine], field: str, options: dict[str, object]
) -> None:
    with Serving(make_engine(three_tasks, start=False, max_running=4)) as server, Client(server.target) as client:
        with pytest.raises(greenroom.InvalidRequestError) as caught:
            client.generate("x", **options)  # type: ignore[arg-type]
        assert [violation.field for violation in caught.value.field_violations] == [field]


def test_many_prompts_at_once_each_find_their_task(serving: Serving, prototypes: dict[str, str]) -> None:
    async def ask_all() -> list[str | None]:
        async with AsyncClient(serving.target) as client:
            asked = [client.generate(text, max_tokens=3) for text in prototypes.values() for _ in range(4)]
            return [answer.routing.task for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [task for task in prototypes for _ in range(4)]


def test_locating_and_describing(client: Client, prototypes: dict[str, str]) -> None:
    task, text = next(iter(prototypes.items()))
    routing = client.locate(text)
    assert (routing.task, routing.scores[0].task, routing.experts) == (task, task, ())
    about = client.describe()
    assert set(about.tasks) == set(prototypes)
    assert (about.generation, about.memory.resident_units) == (routing.generation, 0)
    assert len(about.base_digest) == 64


@pytest.mark.parametrize("raw", [False, True])
def test_an_over_long_prompt_is_refused_by_its_field(client: Client, raw: bool) -> None:
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        client.generate("x" * 5000, raw=raw)
    assert [violation.field for violation in caught.value.field_violations] == ["raw_prompt" if raw else "input"]


def test_an_unknown_task_is_not_found(client: Client) -> None:
    with pytest.raises(greenroom.NotFoundError) as caught:
        client.generate("x", task="purple")
    assert caught.value.reason == "UNKNOWN_TASK"


def test_the_serve_command_says_when_it_is_ready_and_drains_on_sigterm(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path, prototypes: dict[str, str]
) -> None:
    ready = tmp_path / "ready"
    flags = ["--repertoire", three_tasks.repertoire.root, "--base", tiny_base_folder, "--port", "0"]
    flags += ["--expert-memory", "1MiB", "--kv-memory", "8MiB", "--max-running", "2", "--ready-file", ready]
    command = [sys.executable, "-c", "from greenroom.cli.main import run; run()", "serve", *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            assert line[:2] == ["serving", "on"]
            assert line[2] == f"127.0.0.1:{ready.read_text().strip()}"
            with Client(line[2], timeout_s=60.0) as client:
                task, text = next(iter(prototypes.items()))
                assert client.health()
                assert client.generate(text, max_tokens=2).routing.task == task
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_leaving_a_stream_leaves_nothing_behind(client: Client) -> None:
    for _ in range(3):
        with closing(client.stream("x", max_tokens=200, ignore_eos=True)) as stream:
            next(stream)
    assert client.generate("x", max_tokens=2).usage.completion_tokens <= 2
