"""Real servers on the tiny base that are told to stop, or are killed, in the middle of many answers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from repertoires import Workshop

from greenroom import AsyncClient, Client, Delta, Done, GreenroomClientError, UnavailableError
from runtime.model.audit import audit

ROOT = Path(__file__).parents[1]
LIMIT_S = 120.0
NUM_STREAMS = 8
NUM_TOKENS = 150


@dataclass
class Stream:
    """What one client saw."""

    tokens: list[int] = field(default_factory=list)
    done: Done | None = None
    error: GreenroomClientError | None = None


@contextmanager
def serving(workshop: Workshop, base: Path, *, grace: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The serve command, ready."""
    flags = ["--repertoire", workshop.repertoire.root, "--base", base, "--port", "0", "--grace", grace]
    flags += ["--kv-memory", "64MiB", "--max-running", NUM_STREAMS, "--threads", "1", "--step", "torch"]
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


def streams_while(target: str, prompts: list[str], act: Callable[[], object]) -> list[Stream]:
    """Many answers at once; `act` is called when each has begun."""

    async def read(client: AsyncClient, prompt: str, seen: Stream, begun: asyncio.Event) -> None:
        try:
            async for event in client.stream(prompt, max_tokens=NUM_TOKENS, ignore_eos=True):
                if isinstance(event, Delta):
                    seen.tokens += event.token_ids
                    begun.set()
                elif isinstance(event, Done):
                    seen.done = event
        except GreenroomClientError as error:
            seen.error = error

    async def main() -> list[Stream]:
        seen = [Stream() for _ in prompts]
        begun = [asyncio.Event() for _ in prompts]
        async with AsyncClient(target, timeout_s=LIMIT_S) as client:
            tasks = [
                asyncio.create_task(read(client, prompt, one, event))
                for prompt, one, event in zip(prompts, seen, begun, strict=True)
            ]
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), LIMIT_S)
            act()
            await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
        return seen

    return asyncio.run(main())


@pytest.fixture
def prompts(prototypes: dict[str, str]) -> list[str]:
    return [text for number, text in zip(range(NUM_STREAMS), list(prototypes.values()) * NUM_STREAMS, strict=False)]


def test_on_sigterm_every_running_answer_is_finished_and_the_process_ends_well(
    three_tasks: Workshop, tiny_base_folder: Path, prompts: list[str]
) -> None:
    with serving(three_tasks, tiny_base_folder, grace=LIMIT_S) as (process, target):
        seen = streams_while(target, prompts, lambda: process.send_signal(signal.SIGTERM))
        assert [stream.error for stream in seen] == [None] * NUM_STREAMS
        assert [len(stream.tokens) for stream in seen] == [NUM_TOKENS] * NUM_STREAMS
        assert all(stream.done and stream.done.usage.completion_tokens == NUM_TOKENS for stream in seen)
        assert process.wait(LIMIT_S) == 0


def test_a_killed_server_is_ready_again_without_repair_and_cut_answers_are_beginnings_of_whole_ones(
    three_tasks: Workshop, tiny_base_folder: Path, prompts: list[str]
) -> None:
    with serving(three_tasks, tiny_base_folder, grace=1.0) as (process, target):
        killed = streams_while(target, prompts, process.kill)
        assert all(isinstance(stream.error, UnavailableError) for stream in killed if stream.done is None)
        assert process.wait(LIMIT_S) == -signal.SIGKILL
    repertoire = three_tasks.repertoire
    assert audit(repertoire, repertoire.generations()).faults == ()
    with serving(three_tasks, tiny_base_folder, grace=0.0) as (process, target):
        with Client(target, timeout_s=LIMIT_S) as client:
            assert client.health()
            whole = {
                prompt: list(client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids)
                for prompt in set(prompts)
            }
        cut = streams_while(target, prompts, lambda: process.send_signal(signal.SIGTERM))
        assert process.wait(LIMIT_S) == 0
    for prompt, stream in zip(prompts * 2, [*killed, *cut], strict=True):
        assert stream.tokens == whole[prompt][: len(stream.tokens)]
        assert (stream.done is None) == (stream.error is not None)
        assert stream.done is None or len(stream.tokens) == NUM_TOKENS
    assert {type(stream.error) for stream in cut if stream.error} <= {UnavailableError}
