"""The scheduler on random schedules with two finite resources: every request ends, and waits its turn only so long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from runtime.engine.options import Policy
from runtime.engine.request import Request
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import Phase, Sequence

FIRST_LAYER, NUM_LAYERS = 2, 5
TOKENIZER = Tokenizer(models.BPE())
MAX_PASSES = 3
STEP_TOKENS = 16


@dataclass
class Need:
    """What a sequence asks for: KV units, expert units, prompt tokens, tokens to generate; and how its experts come.

    `pinned` ones are known from the start; `slow` is how many steps each layer's experts take to come.
    """

    kv: int
    experts: int
    prompt: int
    output: int
    pinned: bool = False
    slow: int = 0


class Held:
    """Stands in for a reservation: knows when it was made."""

    load_s = 0.0

    def __init__(self, made: int) -> None:
        self.made = made

    def release(self) -> None:
        """The test's own `end` and `give_back` do this."""


class World:
    """Grants KV and experts from two pools and plays the engine's part around the scheduler."""

    def __init__(self, needs: list[Need], *, kv: int, experts: int, policy: Policy = "fcfs") -> None:
        self.kv, self.experts = kv, experts
        self.now = 0
        self.scheduler = Scheduler(
            acquire_slot=self.acquire,
            stage=self.stage,
            layers_ready=self.layers_ready,
            max_step_tokens=STEP_TOKENS,
            max_passes=MAX_PASSES,
            policy=policy,
            missing_bytes=lambda sequence: -self.needs[sequence].experts,
        )
        self.needs: dict[Sequence, Need] = {}
        self.admitted: list[Sequence] = []
        for i, need in enumerate(needs):
            sequence = Sequence(
                Request(request_id=str(i), text="x"),
                [0] * need.prompt,
                generation=None,  # type: ignore[arg-type]
                max_tokens=need.output,
                sink=lambda _event: None,
                tokenizer=TOKENIZER,
            )
            sequence.on_end = self.give_back
            self.needs[sequence] = need
            self.scheduler.add(sequence)

    def acquire(self, sequence: Sequence) -> bool:
        need = self.needs[sequence]
        if need.kv > self.kv:
            return False
        self.kv -= need.kv
        sequence.start(len(self.admitted))
        sequence.decided = sequence.awaits_experts = need.pinned
        self.admitted.append(sequence)
        return True

    def stage(self, sequence: Sequence) -> bool:
        need = self.needs[sequence]
        if need.experts > self.experts:
            return False
        self.experts -= need.experts
        sequence.reservation = Held(self.now)  # type: ignore[assignment]
        sequence.awaits_experts = False
        return True

    def layers_ready(self, sequence: Sequence) -> int:
        if not isinstance(sequence.reservation, Held):
            return FIRST_LAYER
        slow = self.needs[sequence].slow
        come = (self.now - sequence.reservation.made) // slow if slow else NUM_LAYERS
        return min(NUM_LAYERS, FIRST_LAYER + come)

    def give_back(self, sequence: Sequence) -> None:
        need = self.needs[sequence]
        self.kv += need.kv if sequence.slot is not None else 0
        self.experts += need.experts if sequence.reservation is not None else 0

    def step(self) -> int:
        """Run one step as the engine would; returns the tokens that it computed."""
        step = self.scheduler.schedule()
        self.now += 1
        for part in step.prompts:
            sequence = part.sequence
            assert part.layers.start == sequence.layers_done
            assert part.start == sequence.tokens_done
            assert part.layers.stop <= FIRST_LAYER or sequence.reservation is not None, (
                "experts before they are reserved"
            )
            if sequence.advance(part.length):
                if sequence.layers_done == NUM_LAYERS:
                    sequence.phase = Phase.DECODING
                elif not sequence.decided:
                    assert sequence.layers_done == FIRST_LAYER, "the locator looks before the first expert layer"
                    sequence.decided = sequence.awaits_experts = True
        for sequence in step.decode:
            sequence.output.append(0)
            if len(sequence.output) == sequence.max_tokens:
                self.end(sequence)
        self.scheduler.sweep()
        return len(step.decode) + sum(part.length for part in step.prompts)

    def end(self, sequence: Sequence) -> None:
        sequence.reservation, held = None, sequence.reservation
        sequence.on_end = lambda _sequence: None
        self.kv += self.needs[sequence].kv
        self.experts += self.needs[sequence].experts if held else 0
        sequence.finish("length")


needs = st.builds(
    Need,
    kv=st.integers(1, 10),
    experts=st.integers(0, 10),
    prompt=st.integers(1, 40),
    output=st.integers(1, 5),
    pinned=st.booleans(),
    slow=st.integers(0, 3),
)


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(needs, min_size=1, max_size=12),
    st.integers(10, 20),
    st.integers(10, 20),
    st.sampled_from(get_args(Policy)),
)
def test_every_request_ends_and_no_budget_is_exceeded(
    wanted: list[Need], kv: int, experts: int, policy: Policy
) -> None:
    world = World(wanted, kv=kv, experts=experts, policy=policy)
    layers = NUM_LAYERS - FIRST_LAYER
    bound = 10 + sum(need.prompt * (1 + layers) + need.output + 3 + layers * need.slow for need in wanted)
    for _ in range(bound):
        if not list(world.scheduler.all()):
            break
        world.step()
        assert world.kv >= 0
        assert world.experts >= 0
    assert not list(world.scheduler.all()), "some request never ended"
    assert (world.kv, world.experts) == (kv, experts), "something was not given back"


@settings(max_examples=500, deadline=None)
@given(st.lists(needs, min_size=1, max_size=12))
def test_a_step_computes_no_more_tokens_than_it_may(wanted: list[Need]) -> None:
    world = World(wanted, kv=100, experts=100)
    for _ in range(500):
        decoding = sum(sequence.phase is Phase.DECODING for sequence in world.scheduler.running)
        assert world.step() <= max(STEP_TOKENS, decoding + 1)


def test_a_large_request_is_passed_by_small_ones_only_so_often() -> None:
    # The first holds 5 of 10 units for long; the second needs 10; later ones need 1 and come and go.
    world = World(
        [Need(5, 0, 1, 40), Need(10, 0, 1, 1), *(Need(1, 0, 1, 1) for _ in range(20))],
        kv=10,
        experts=0,
    )
    for _ in range(200):
        world.step()
    order = [int(sequence.request.request_id) for sequence in world.admitted]
    assert order.index(1) <= 1 + MAX_PASSES + 4, "passed by more than the bound and those admitted in the same round"
    assert order.index(1) > 1, "smaller requests did pass while it could not run"


@pytest.mark.parametrize(("policy", "first"), [("fcfs", 0), ("locality", 1)])
def test_the_policy_says_who_is_tried_first_and_a_starved_one_comes_before_all(policy: Policy, first: int) -> None:
    world = World([Need(1, 6, 1, 1), Need(1, 9, 1, 1)], kv=10, experts=10, policy=policy)
    world.step()
    world.scheduler.schedule()
    assert [sequence.reservation is not None for sequence in world.needs].index(True) == first
    world = World([Need(1, 6, 1, 1), Need(1, 9, 1, 1)], kv=10, experts=10, policy=policy)
    world.step()
    starved, other = world.needs
    starved.times_passed = MAX_PASSES
    world.scheduler.schedule()
    assert (starved.awaits_experts, other.awaits_experts) == (False, True)


def test_a_prompt_goes_as_far_as_its_experts_are_there_and_all_of_it_through_one_range_before_the_next() -> None:
    world = World([Need(1, 1, STEP_TOKENS + 4, 1, pinned=True, slow=2)], kv=10, experts=10)
    (sequence,) = world.needs
    seen = []
    while sequence.phase is not Phase.DECODING:
        step = world.scheduler.schedule()
        seen += [(part.layers.start, part.layers.stop, part.length) for part in step.prompts]
        world.step()
    assert seen[:2] == [(0, 2, STEP_TOKENS), (0, 2, 4)]
    assert [(start, stop) for start, stop, _ in seen[2:]] == [(2, 3), (2, 3), (3, 4), (3, 4), (4, 5), (4, 5)]


@pytest.mark.parametrize("when", ["waiting", "before", "between", "decoding"])
def test_a_request_that_ends_early_is_forgotten_and_the_others_go_on(when: str) -> None:
    world = World([Need(10, 5, 30, 2, slow=1), Need(10, 5, 3, 2)], kv=10, experts=10)
    first, second = world.needs
    there = {
        "waiting": lambda: first.phase is Phase.WAITING,
        "before": lambda: first.phase is Phase.PROMPT and first.tokens_done > 0,
        "between": lambda: first.layers_done > FIRST_LAYER,
        "decoding": lambda: first.phase is Phase.DECODING,
    }[when]
    while not there():
        world.step()
    first.finish("length")
    for _ in range(30):
        world.step()
        world.scheduler.sweep()
    assert second.phase is Phase.ENDED
    assert world.kv == 10
