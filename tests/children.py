"""Child processes for tests: forked, told when to go on, and asked how they ended.

It does not know what they do.
Read first: `with child(work) as process:` runs `work(gate)` in a fork; `gate.reached()` there lets
`process.wait_reached()` here return and waits for `process.go_on()`. What `work` returns is the exit code; an exception
gives 99.
"""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TIMEOUT_S = 60
CRASHED = 99


class Gate:
    """Where a child waits for its parent."""

    def __init__(self, told: int, heard: int) -> None:
        self._told, self._heard = told, heard

    def reached(self) -> None:
        """Tell the parent and wait for it."""
        os.write(self._told, b".")
        os.read(self._heard, 1)


class Child:
    """A running child."""

    def __init__(self, pid: int, heard: int, told: int) -> None:
        self.pid = pid
        self._heard, self._told = heard, told
        self._status: int | None = None

    def wait_reached(self) -> None:
        """Wait until the child is at its gate."""
        assert select.select([self._heard], [], [], TIMEOUT_S)[0], "the child did not get there in time"
        assert os.read(self._heard, 1) == b".", "the child ended before it got there"

    def go_on(self) -> None:
        """Let the child pass its gate."""
        os.write(self._told, b".")

    def kill(self) -> None:
        """End it without a chance to clean up."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end; returns the exit code, or minus the signal that killed it."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


@contextmanager
def child(work: Callable[[Gate], int]) -> Iterator[Child]:
    """Run `work` in a fork; it is killed at the end of the block if it still runs."""
    child_hears, parent_tells = os.pipe()
    parent_hears, child_tells = os.pipe()
    if not (pid := os.fork()):
        code = CRASHED
        try:
            os.close(parent_tells)
            os.close(parent_hears)
            code = work(Gate(child_tells, child_hears))
        except BaseException:  # noqa: BLE001 - a fork must not come back into the tests
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(child_hears)
    os.close(child_tells)
    process = Child(pid, parent_hears, parent_tells)
    try:
        yield process
    finally:
        if process._status is None:
            with suppress(ProcessLookupError):
                process.kill()
            process.end()
        os.close(parent_hears)
        os.close(parent_tells)


class DiesAt:
    """Kills its own process at a step."""

    def __init__(self, deadly: int) -> None:
        self.left = deadly

    def __call__(self, _step: str) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
