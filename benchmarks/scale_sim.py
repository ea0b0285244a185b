"""Simulation: 10,000 experts over 100 replicas under Zipf traffic, and what routing by expert saves.

It knows nothing of Ray or the engine: pure Python, seeded, the same figures on every machine.
Read first: a replica has lanes (sequences that run at once), one loader that reads an expert at a time, and an LRU
memory of bytes. A request goes to a replica on arrival, waits for a lane and for its expert, and then runs. Routers see
exact queue lengths and residency, which a real entry learns a little later. Times are those of a middling GPU node that
reads from a shared store; what matters is what differs between policies.

    python benchmarks/scale_sim.py
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scale_sim.json"


@dataclass(frozen=True, kw_only=True)
class World:
    """What is simulated.

    Args:
        experts: registered.
        replicas: each with a memory of its own.
        zipf: the i-th expert is asked for in proportion to `1 / i^zipf`.
        requests: after the warm-up, which has a quarter as many and is not counted.
        load: of all lanes if no expert had ever to be read; below 1.
        lanes: sequences that a replica runs at once.
        service_s: mean seconds of a sequence, exponential.
        expert_bytes: of one expert.
        memory_bytes: of one replica for experts.
        read_bytes_per_s: of one replica's loader.
        spread: the entry leaves a replica that has the expert for the least loaded one when it has so many more
            sequences than that.
        seed: of everything.
    """

    experts: int = 10_000
    replicas: int = 100
    zipf: float = 1.0
    requests: int = 200_000
    load: float = 0.7
    lanes: int = 16
    service_s: float = 2.0
    expert_bytes: int = 40_000_000
    memory_bytes: int = 4_000_000_000
    read_bytes_per_s: int = 500_000_000
    spread: int = 8
    seed: int = 0


class Replica:
    """Lanes, a loader, and the experts in memory."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._room = world.memory_bytes // world.expert_bytes
        self._lanes = [0.0] * world.lanes
        self._loader_free = 0.0
        self.resident: OrderedDict[int, float] = OrderedDict()  # expert -> when it is there

    def take(self, expert: int, now: float, service_s: float) -> tuple[bool, float, float, int | None]:
        """Run a request: (whether the expert was in memory, seconds it waited, when it ends, what was evicted)."""
        hit, evicted = expert in self.resident, None
        if not hit:
            if len(self.resident) >= self._room:
                evicted, _ = self.resident.popitem(last=False)
            self._loader_free = max(self._loader_free, now) + self._world.expert_bytes / self._world.read_bytes_per_s
            self.resident[expert] = self._loader_free
        self.resident.move_to_end(expert)
        begin = max(now, heapq.heappop(self._lanes), self.resident[expert])
        heapq.heappush(self._lanes, begin + service_s)
        return hit, begin - now, begin + service_s, evicted


Choose = Callable[[int], int]
"""Expert -> replica."""


def chooser(
    policy: str, world: World, waiting: Sequence[int], homes: dict[int, set[int]], rng: random.Random
) -> Choose:
    """How an entry chooses.

    Args:
        policy: "expert_aware", "round_robin" or "random".
        world: see there.
        waiting: sequences of each replica, kept up to date.
        homes: expert -> replicas that have it, kept up to date.
        rng: for "random".
    """
    turns = itertools.cycle(range(world.replicas))

    def aware(expert: int) -> int:
        least = min(range(world.replicas), key=waiting.__getitem__)
        home = min(sorted(homes.get(expert, ())), key=waiting.__getitem__, default=None)
        return least if home is None or waiting[home] - waiting[least] >= world.spread else home

    choices: dict[str, Choose] = {
        "expert_aware": aware,
        "round_robin": lambda _expert: next(turns),
        "random": lambda _expert: rng.randrange(world.replicas),
    }
    return choices[policy]


def simulate(policy: str, world: World) -> dict[str, float]:
    """One policy: `hit_rate`, `load_bytes_per_request`, and the 99th percentile of seconds waited, `p99_queue`."""
    rng = random.Random(world.seed)
    cumulated = list(itertools.accumulate(1 / rank**world.zipf for rank in range(1, world.experts + 1)))
    replicas = [Replica(world) for _ in range(world.replicas)]
    waiting = [0] * world.replicas
    homes: dict[int, set[int]] = {}
    ends: list[tuple[float, int]] = []
    choose = chooser(policy, world, waiting, homes, random.Random(world.seed + 1))
    rate = world.load * world.replicas * world.lanes / world.service_s
    warm = world.requests // 4
    now, hits, waits = 0.0, 0, []
    for number in range(warm + world.requests):
        now += rng.expovariate(rate)
        expert = bisect_left(cumulated, rng.random() * cumulated[-1])
        while ends and ends[0][0] <= now:
            waiting[heapq.heappop(ends)[1]] -= 1
        place = choose(expert)
        hit, wait, end, evicted = replicas[place].take(expert, now, rng.expovariate(1 / world.service_s))
        homes.setdefault(expert, set()).add(place)
        if evicted is not None:
            homes[evicted].discard(place)
        waiting[place] += 1
        heapq.heappush(ends, (end, place))
        if number >= warm:
            hits += hit
            waits.append(wait)
    hit_rate = hits / world.requests
    return {
        "hit_rate": round(hit_rate, 4),
        "load_bytes_per_request": round((1 - hit_rate) * world.expert_bytes),
        "p99_queue": round(sorted(waits)[int(0.99 * len(waits))], 4),
    }


def main() -> None:
    """Simulate every policy and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=World().requests)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    world = World(requests=arguments.requests)
    policies = {}
    for policy in ("expert_aware", "round_robin", "random"):
        policies[policy] = simulate(policy, world)
        print(json.dumps({"policy": policy, **policies[policy]}))
    result = {"command": "python benchmarks/scale_sim.py", "world": asdict(world), "policies": policies}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
