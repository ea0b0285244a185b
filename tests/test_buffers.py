"""Buffers: room is used again exactly when nobody can see what lay in it, and idle arenas go back."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.memory.buffers import ALIGNMENT, Buffers


def taken(buffers: Buffers, num_bytes: int) -> memoryview:
    (view,) = buffers.take([num_bytes])
    return view


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def test_a_buffer_has_the_length_that_was_asked_for_and_begins_at_a_line_of_the_cache() -> None:
    buffers = Buffers(arena_bytes=4096)
    for size in (1, 63, 64, 65, 1000, 5000):
        view = taken(buffers, size)
        assert len(view) == size
        assert address(view) % ALIGNMENT == 0
        view[-1] = 7


def test_room_that_a_tensor_still_shows_is_not_given_again() -> None:
    buffers = Buffers(arena_bytes=4096)
    view = taken(buffers, 4096)
    tensor = torch.frombuffer(view, dtype=torch.float32).as_strided((4, 4), (4, 1), 8)
    tensor.fill_(3.0)
    first = address(view)
    del view
    gc.collect()
    other = taken(buffers, 4096)
    assert address(other) != first
    other[:] = bytes(4096)
    assert bool((tensor == 3.0).all())


def test_room_is_used_again_once_everything_made_of_it_is_gone() -> None:
    buffers = Buffers(arena_bytes=4096)
    view = taken(buffers, 4096)
    first, tensor = address(view), torch.frombuffer(view, dtype=torch.float32)
    del view
    del tensor
    gc.collect()
    assert address(taken(buffers, 4096)) == first
    assert buffers.held_bytes == 4096


def test_a_buffer_larger_than_an_arena_has_one_of_its_own() -> None:
    buffers = Buffers(arena_bytes=4096)
    view = taken(buffers, 10_000)
    view[:] = bytes(10_000)
    assert 10_000 <= buffers.held_bytes < 10_000 + ALIGNMENT


def test_idle_arenas_beyond_those_that_are_kept_go_back_to_the_system() -> None:
    buffers = Buffers(idle_arenas=1, arena_bytes=4096)
    views = [taken(buffers, 4096) for _ in range(5)]
    assert buffers.held_bytes == 5 * 4096
    views.clear()
    gc.collect()
    assert buffers.held_bytes == 4096
    buffers.check_integrity()


def test_what_is_taken_together_lies_together_where_there_is_such_a_gap_and_is_found_anyway_where_not() -> None:
    buffers = Buffers(arena_bytes=4096)
    buffers.take([4096])
    first, second, third = buffers.take([1000, 1024, 2000])
    assert [address(view) - address(first) for view in (first, second, third)] == [0, 1024, 2048]
    kept, where = second, address(first)
    del first, second, third
    apart = buffers.take([1024, 1024, 1024])
    assert sorted(address(view) - where for view in apart) == [0, 2048, 3072], "on both sides of what is still held"
    assert buffers.held_bytes == 4096
    assert len(kept) == 1024
    buffers.check_integrity()


_SIZE = st.integers(0, 3000)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.lists(_SIZE, min_size=1, max_size=4), st.tuples(st.just("drop"), st.integers(0, 50))), max_size=60
    ),
    st.integers(0, 2),
)
def test_whatever_is_taken_and_dropped_no_byte_is_lent_twice_and_gaps_join_again(
    steps: list[list[int] | tuple[str, int]], idle_arenas: int
) -> None:
    buffers = Buffers(idle_arenas=idle_arenas, arena_bytes=2048)
    held: dict[tuple[int, int], memoryview] = {}
    for number, step in enumerate(steps):
        if isinstance(step, list):
            held.update(((number, place), view) for place, view in enumerate(buffers.take(step)))
            for place, size in enumerate(step):
                held[number, place][:] = bytes([4 * number + place]) * size
        elif held:
            del held[list(held)[step[1] % len(held)]]
        buffers.check_integrity()
    for (number, place), view in held.items():
        assert bytes(view) == bytes([4 * number + place]) * len(view)
    view = memoryview(b"")
    del view
    held.clear()
    buffers.check_integrity()
    assert buffers.held_bytes <= idle_arenas * 4 * 3008, "all gaps have joined, so idle arenas can go"


def test_threads_that_take_and_drop_at_once_never_share_a_byte() -> None:
    buffers = Buffers(arena_bytes=8192)

    def work(number: int) -> int:
        wrong = 0
        for size in range(1, 300):
            view = taken(buffers, size * 7)
            view[:] = bytes([number]) * len(view)
            wrong += bytes(view) != bytes([number]) * len(view)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8
    gc.collect()
    buffers.check_integrity()


@pytest.mark.parametrize("size", [64, 4096])
def test_taking_and_dropping_for_ever_needs_no_more_memory_than_once(size: int) -> None:
    buffers = Buffers(arena_bytes=4096)
    for _ in range(500):
        taken(buffers, size)
    assert buffers.held_bytes <= 2 * 4096
