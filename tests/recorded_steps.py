"""A stand-in for CUDA graphs: records the operations of a function, and runs exactly these again on the same memory.

It does not know what is recorded.
Read first: as on a device, a replay decides nothing in Python and makes no tensor: every operation reads and writes the
memory that it had when it was recorded, and in between others use what is not its own. What a recording may not hold
raises `NotRecordableError` while it is made: waiting for a value, shapes that follow from values, and tensors that are
made of numbers of the host. Every replay is compared, bit for bit, with what the function does when it is run; so the
function must be one that may be run again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from runtime.kernels.graph_capture import Captured
from runtime.kernels.triton_interpreter import interpret
from runtime.kernels.triton_mixture import Launch

FORBIDDEN = frozenset(
    {
        "_local_scalar_dense",  # item, tolist, bool of a tensor
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "repeat_interleave",  # of which the sizes are values
        "bincount",
        "lift_fresh",  # torch.tensor(numbers)
        "lift_fresh_copy",
    }
)


class NotRecordableError(Exception):
    """A recorded function did what no recording can hold."""


class WrongReplayError(Exception):
    """A replay did something else than the function that was recorded does now."""


@dataclass
class Recording:
    """What one function did, in order.

    Args:
        run: the function.
        actions: to do it again.
        names: of its operations.
        changed: what it wrote that was there before.
        made: what it made, in memory that between two replays belongs to others.
    """

    run: Callable[[], None]
    actions: list[Callable[[], None]] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)
    changed: list[torch.Tensor] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)

    def replay(self) -> None:
        """Do it again, and check that the function itself leaves everything as that did."""
        for tensor in self.made:
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
        for action in self.actions:
            action()
        left = [tensor.clone() for tensor in self.changed]
        self.run()
        for number, (tensor, before) in enumerate(zip(self.changed, left, strict=True)):
            if not torch.equal(tensor, before):
                raise WrongReplayError(f"a replay leaves {len(left)} tensors changed, and number {number} otherwise")


class RecordedSteps:
    """Records functions; a `Capture` of `runtime.kernels.graph_capture`, and a `Launcher` whose launches are recorded.

    Args:
        num_bytes: that every recording claims to hold.
    """

    def __init__(self, *, num_bytes: int = 0) -> None:
        self.recordings: list[Recording] = []
        self.replays: list[Recording] = []
        self._num_bytes = num_bytes
        self._current: Recording | None = None

    def __call__(self, run: Callable[[], None]) -> Captured:
        recording = self._current = Recording(run)
        try:
            with _Recorder(recording):
                run()
        finally:
            self._current = None
        self.recordings.append(recording)

        def replay() -> None:
            self.replays.append(recording)
            recording.replay()

        return Captured(replay, self._num_bytes)

    def launch(self, launch: Launch) -> None:
        """Run a kernel in the interpreter, and record that."""
        with _disable_current_modes():
            interpret(launch)
        if self._current is not None:
            self._current.names[launch.variant.kernel] += 1
            self._current.actions.append(lambda: interpret(launch))


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._made: set[int] = set()  # addresses of what the function makes itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        masks = name.startswith("index") and any(tensor.dtype is torch.bool for tensor in _tensors(args[1:2]))
        if name in FORBIDDEN or masks or (name == "where" and len(args) == 1):
            raise NotRecordableError(f"{name} cannot be recorded")
        result = func(*args, **kwargs)
        self._recording.names[name] += 1
        outputs, memory = _tensors(result), {_address(tensor) for tensor in inputs}
        if func._schema.is_mutable:
            self._recording.actions.append(lambda: func(*args, **kwargs))
            if _address(args[0]) not in self._made:
                self._recording.changed.append(args[0])
        elif not all(_address(tensor) in memory for tensor in outputs):
            self._made |= {_address(tensor) for tensor in outputs}
            self._recording.made += outputs
            self._recording.actions.append(lambda: _again(func, args, kwargs, outputs))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
    for place, tensor in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
        place.copy_(tensor)
