"""Copies onto a device, and the kernels that read what lies there: in which order, on queues that are written down."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch

from runtime.memory.copying import HostCopier, QueuedCopier, make_copier
from runtime.memory.keys import UnitKey
from runtime.memory.slab_tier import SlabTier
from runtime.memory.wanted import Wanted
from runtime.model.expert import Expert, LowRank

CPU = torch.device("cpu")


class LazyQueues:
    """A device with two queues that run nothing before somebody waits, and then only what must have run by then."""

    def __init__(self) -> None:
        self.compute: deque[Callable[[], object]] = deque()
        self.copies: deque[Callable[[], object]] = deque()
        self.computed = 0
        self.queued = 0
        self.buffers: list[torch.Tensor] = []

    def kernel(self, work: Callable[[], None]) -> None:
        """Queue what a kernel would do."""
        self.compute.append(work)
        self.queued += 1

    def record_compute(self) -> object:
        return self.queued

    def wait_on_copies(self, event: object) -> None:
        assert isinstance(event, int)
        self.copies.append(lambda: self.compute_until(event))

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        self.buffers.append(torch.empty(count, dtype=dtype))
        return self.buffers[-1]

    def queue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert any(source.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in self.buffers)
        self.copies.append(partial(target.copy_, source))

    def finish_copies(self) -> None:
        while self.copies:
            self.copies.popleft()()

    def compute_until(self, count: int) -> None:
        while self.computed < count:
            self.compute.popleft()()
            self.computed += 1


def expert(value: float) -> Expert:
    update = LowRank(torch.full((2, 4), value), torch.full((6, 2), -value))
    return Expert(layer=0, scale=1.0, updates={"up": update})


def key(name: str) -> UnitKey:
    return (name, 0)


def wanted(name: str) -> Wanted:
    return Wanted(key(name), "task", 80, ((2, 4), (2, 6)), lambda: expert(0.0))


def tier(queues: LazyQueues) -> SlabTier:
    """Room for one expert."""
    copier = QueuedCopier(queues, torch.float32)
    return SlabTier(budget_bytes=2 * 10 * 4, dtype=torch.float32, device=CPU, slab_bytes=16, copier=copier)


def test_room_that_is_used_again_is_written_after_the_kernels_that_read_what_lay_there() -> None:
    queues, read = LazyQueues(), []
    slabs = tier(queues)
    assert slabs.hold([wanted("a")], [])
    first = slabs.put(key("a"), expert(1.0))
    assert isinstance(first, Expert)
    seen = first.updates["up"].a
    queues.kernel(lambda: read.append(seen.clone()))  # the engine queues a step and does not wait for it
    slabs.let_go(key("a"))
    gone: list[UnitKey] = []
    assert slabs.hold([wanted("b")], gone)
    assert gone == [key("a")]
    second = slabs.put(key("b"), expert(2.0))
    assert isinstance(second, Expert)
    assert [float(each.mean()) for each in read] == [1.0], "the step read what it was given"
    assert float(second.updates["up"].a.mean()) == 2.0


def test_what_was_put_is_there_when_kernels_are_queued_after_it() -> None:
    queues = LazyQueues()
    slabs = tier(queues)
    assert slabs.hold([wanted("a")], [])
    put = slabs.put(key("a"), expert(3.0))
    assert not queues.copies, "put returns when the copy is done"
    assert isinstance(put, Expert)
    assert float(put.updates["up"].a.mean()) == 3.0
    assert float(put.updates["up"].b.mean()) == -3.0


def test_a_copy_waits_for_no_kernel_that_was_queued_after_its_room_was_taken() -> None:
    queues, ran = LazyQueues(), []
    slabs = tier(queues)
    queues.kernel(lambda: ran.append("before"))
    assert slabs.hold([wanted("a")], [])
    queues.kernel(lambda: ran.append("after"))
    slabs.put(key("a"), expert(1.0))
    assert ran == ["before"]


def test_copies_go_through_one_pinned_buffer_that_grows() -> None:
    queues = LazyQueues()
    copier = QueuedCopier(queues, torch.float32)
    targets = [torch.zeros(3), torch.zeros(2, 4), torch.zeros(3)]
    for target in targets:
        copier.copy([(target, torch.ones_like(target))])
    assert [len(buffer) for buffer in queues.buffers] == [3, 8]
    assert all(bool((target == 1).all()) for target in targets)


def test_where_nothing_is_queued_copies_are_plain() -> None:
    copier = make_copier(CPU, torch.bfloat16)
    assert isinstance(copier, HostCopier)
    target = torch.zeros(4, dtype=torch.bfloat16)
    copier.mark()
    copier.copy([(target, torch.ones(4))])
    assert bool((target == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_copies_over_its_own_stream() -> None:
    device = torch.device("cuda", 0)
    copier = make_copier(device, torch.float32)
    target = torch.zeros(1000, device=device)
    copier.mark()
    copier.copy([(target, torch.arange(1000.0))])
    assert torch.equal(target.cpu(), torch.arange(1000.0))
