"""The HTTP front end, the page's status and the Open Inference Protocol over the real engine on the tiny base.

It does not know whether answers are right: `test_engine.py` does; here all doors give what the engine gives.
Read first: the engine's fixture checks for leaks when the test ends.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import ask
from openai import OpenAI
from repertoires import Workshop
from serving import Serving
from triton_process import TritonProcess

from runtime.engine.engine import Engine


@pytest.fixture
def engine(three_tasks: Workshop, make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(three_tasks, start=False)


@pytest.fixture
def serving(engine: Engine) -> Iterator[Serving]:
    with Serving(engine, http=True) as server:
        yield server


@pytest.fixture
def client(serving: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60.0) as connected:
        yield connected


def status(serving: Serving) -> Any:
    with urllib.request.urlopen(f"{serving.url}/status", timeout=60) as response:
        return json.load(response)


def test_every_door_gives_the_engines_own_text(
    client: OpenAI, serving: Serving, engine: Engine, triton: TritonProcess, prototypes: dict[str, str]
) -> None:
    for task, text in prototypes.items():
        own = ask(engine, text, max_tokens=6, sampling={"ignore_eos": False}).wait().text
        chat = client.chat.completions.create(
            model="greenroom", messages=[{"role": "user", "content": text}], max_completion_tokens=6
        )
        assert (chat.choices[0].message.content, chat.greenroom["task"]) == (own, task)  # type: ignore[attr-defined]
        answer = triton.ask(serving.target, "infer", model="greenroom", text=text, parameters={"max_tokens": 6})
        assert answer["outputs"]["text_output"] == [own]


def test_a_streams_pieces_joined_are_the_whole(client: OpenAI, prototypes: dict[str, str]) -> None:
    wanted: dict[str, Any] = {"model": "greenroom:red", "prompt": prototypes["red"], "max_tokens": 12}
    wanted["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**wanted)
    pieces = client.completions.create(**wanted, stream=True)
    assert "".join(choice.text for chunk in pieces for choice in chunk.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_the_weights_of_a_layer_are_shares_of_the_experts_that_were_used(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="greenroom:blue",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=4,
        extra_body={"explain": True},
    )
    report = answer.greenroom  # type: ignore[attr-defined]
    used = {use["digest"] for use in report["experts"]}
    assert report["layers"]
    for layer in report["layers"]:
        assert set(layer["experts"]) <= used
        assert sum(layer["experts"].values()) == pytest.approx(1, abs=1e-3)


def test_the_status_follows_experts_into_memory(client: OpenAI, serving: Serving) -> None:
    before = status(serving)
    assert {unit["state"] for task in before["tasks"] for unit in task["layers"]} == {"absent"}
    client.chat.completions.create(model="greenroom:red", messages=[{"role": "user", "content": "x"}], max_tokens=2)
    after = {task["name"]: task for task in status(serving)["tasks"]}
    assert {unit["state"] for unit in after["red"]["layers"]} == {"ready"}
    assert {unit["state"] for unit in after["blue"]["layers"]} == {"absent"}
    assert after["red"]["host_bytes"] > 0 == after["blue"]["host_bytes"]


def test_log_probabilities_and_choices_come_through(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="greenroom",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=3,
        n=2,
        temperature=1.0,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2, 2, 2]
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
