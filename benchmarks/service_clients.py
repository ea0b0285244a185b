"""The clients of `benchmarks/service.py`, in a process of their own: streams that behave, misbehave or only count.

It imports no torch.
Read first: it answers each line of JSON on stdin with one on stdout, and ends when stdin does.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from greenroom import AsyncClient, GreenroomClientError
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb

GENERATE = "/greenroom.v1.Greenroom/Generate"
STREAM_PROMPTS = [
    f"Report {task:04d}: say something short about {subject} and rivers."
    for task, subject in enumerate(
        ("rivers", "bridges", "violins", "engines", "gardens", "stars", "coins", "maps", "clocks", "sails")
    )
]
HEALTH_EVERY_S = 0.05
BAD_REQUESTS = (
    ({"max_tokens": 0}, "INVALID_ARGUMENT"),
    ({"temperature": -1.0}, "INVALID_ARGUMENT"),
    ({"top_p": 7.0}, "INVALID_ARGUMENT"),
    ({"task": "nobody-trained-this"}, "NOT_FOUND"),
    ({"task": "../../etc"}, "INVALID_ARGUMENT"),
    ({"request_id": "no spaces"}, "INVALID_ARGUMENT"),
)


@dataclass
class Tally:
    """What became of the requests."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, outcome: str, expected: set[str]) -> None:
        """One request has ended."""
        self.outcomes[f"{kind} {outcome}"] += 1
        if outcome not in expected:
            self.unexpected[f"{kind} {outcome}"] += 1


async def behave(client: AsyncClient, dice: random.Random, tally: Tally, target: str) -> None:
    """One request of a random kind."""
    kind = dice.choices(("answer", "cancel", "deadline", "disconnect", "bad", "huge"), (50, 15, 12, 8, 13, 2))[0]
    prompt, tokens = dice.choice(STREAM_PROMPTS), dice.randint(1, 24)
    tally.requests += 1
    outcome, expected = "OK", {"OK", "RESOURCE_EXHAUSTED"}
    try:
        if kind == "answer":
            await client.generate(prompt, max_tokens=tokens, ignore_eos=True)
        elif kind == "cancel":
            async with aclosing(client.stream(prompt, max_tokens=200, ignore_eos=True)) as stream:
                for _ in range(dice.randint(1, 12)):
                    await anext(stream)
        elif kind == "deadline":
            expected |= {"DEADLINE_EXCEEDED"}
            await client.generate(prompt, max_tokens=200, ignore_eos=True, timeout_s=dice.uniform(0.001, 0.5))
        elif kind == "disconnect":
            async with AsyncClient(target) as other:
                await anext(other.stream(prompt, max_tokens=200, ignore_eos=True))
        elif kind == "huge":
            expected = {"INVALID_ARGUMENT"}
            await client.generate("x" * 1_000_001)
        else:
            options, code = dice.choice(BAD_REQUESTS)
            expected = {code}
            await client.generate(prompt, **options)  # type: ignore[arg-type]
    except GreenroomClientError as error:
        outcome = error.code.name
        if outcome == "RESOURCE_EXHAUSTED":
            await asyncio.sleep(error.retry_after_s or 0.1)
    tally.count(kind, outcome, expected)


async def watch_health(target: str, times: list[float], stop: asyncio.Event) -> None:
    """Ask for health again and again."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(service=""))
        while not stop.is_set():
            started = time.perf_counter()
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            times.append(1e3 * (time.perf_counter() - started))
            await asyncio.sleep(HEALTH_EVERY_S)


async def watch_alone(target: str) -> None:
    """Ask for health from a process that does nothing else, until stdin ends; then say how long it took."""
    times: list[float] = []
    stop = asyncio.Event()
    watching = asyncio.create_task(watch_health(target, times, stop))
    await asyncio.to_thread(sys.stdin.read)
    stop.set()
    await watching
    print(json.dumps(times), flush=True)


async def load(target: str, question: dict[str, float]) -> dict[str, object]:
    """`streams` workers for `seconds`."""
    tally, end = Tally(), time.monotonic() + question["seconds"]
    command = (sys.executable, __file__, "health", target)
    pipe = asyncio.subprocess.PIPE
    watcher = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 24)

    async def work(number: int) -> None:
        dice = random.Random(question["seed"] * 1000 + number)
        async with AsyncClient(target, timeout_s=60.0) as client:
            while time.monotonic() < end:
                await behave(client, dice, tally, target)

    await asyncio.gather(*(work(number) for number in range(int(question["streams"]))))
    said, _ = await watcher.communicate(b"")
    alone = sorted(json.loads(said))
    return {
        "requests": tally.requests,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "unexpected": dict(tally.unexpected),
        "unaccounted": tally.requests - tally.outcomes.total() + tally.unexpected.total(),
        "health_checks": len(alone),
        "health_p50_ms": alone[len(alone) // 2],
        "health_p99_ms": alone[int(0.99 * len(alone))],
        "health_max_ms": alone[-1],
    }


async def streams(channel: grpc.aio.Channel, question: dict[str, int]) -> dict[str, float]:
    """So many streams at once, whose messages are counted and not read: how long until the last has ended."""
    call = channel.unary_stream(GENERATE, request_serializer=pb.GenerateRequest.SerializeToString)

    async def one(prompt: str) -> int:
        sampling = pb.Sampling(max_tokens=question["tokens"], ignore_eos=True)
        return sum([1 async for _ in call(pb.GenerateRequest(input=prompt, sampling=sampling))])

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in STREAM_PROMPTS[: question["streams"]]))
    return {"seconds": time.perf_counter() - started, "messages": sum(counts)}


async def main() -> None:
    """Answer lines until there are none."""
    what, target = sys.argv[1:]
    if what == "health":
        await watch_alone(target)
        return
    async with grpc.aio.insecure_channel(target) as channel:
        while line := await asyncio.to_thread(sys.stdin.readline):
            question = json.loads(line)
            said = await (load(target, question) if what == "load" else streams(channel, question))
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
