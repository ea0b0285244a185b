"""The simulation of many replicas: seeded, and routing by expert pays for what the committed figures say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_sim", ROOT / "benchmarks" / "scale_sim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_sim"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(simulation: ModuleType, **fields: object) -> object:
    sizes = {"experts": 200, "replicas": 10, "requests": 4000, "memory_bytes": 800_000_000, "read_bytes_per_s": 10**8}
    return simulation.World(**{**sizes, **fields})


def test_the_same_seed_gives_the_same_figures(simulation: ModuleType) -> None:
    world = small(simulation)
    assert simulation.simulate("random", world) == simulation.simulate("random", world)
    assert simulation.simulate("random", world) != simulation.simulate("random", small(simulation, seed=1))


def test_routing_by_expert_hits_more_reads_less_and_waits_less(simulation: ModuleType) -> None:
    aware, turns, chance = (
        simulation.simulate(p, small(simulation)) for p in ("expert_aware", "round_robin", "random")
    )
    for other in (turns, chance):
        assert aware["hit_rate"] > other["hit_rate"] + 0.2
        assert aware["load_bytes_per_request"] < other["load_bytes_per_request"] / 2
        assert aware["p99_queue"] < other["p99_queue"]


def test_a_memory_that_holds_everything_makes_all_policies_alike(simulation: ModuleType) -> None:
    world = small(simulation, experts=5, memory_bytes=10**9)
    for policy in ("expert_aware", "round_robin", "random"):
        assert simulation.simulate(policy, world)["hit_rate"] > 0.98


def test_the_committed_figures_are_those_of_the_whole_world(simulation: ModuleType) -> None:
    result = json.loads(simulation.RESULTS.read_text())
    world = simulation.World()
    assert (world.experts, world.replicas) == (10_000, 100)
    assert result["world"] == {name: getattr(world, name) for name in result["world"]}
    assert {tuple(figures) for figures in result["policies"].values()} == {
        ("hit_rate", "load_bytes_per_request", "p99_queue")
    }
    assert result["policies"]["round_robin"] == simulation.simulate("round_robin", world)
