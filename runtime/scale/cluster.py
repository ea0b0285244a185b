"""The Ray cluster that a command runs on: one that exists, or one of its own on this machine.

It knows nothing of what runs there.
Read first: Ray is the extra `scale`; nothing outside `runtime.scale` imports it, and here only when it is asked for. A
cluster of our own ends with the command, whatever happens.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.errors import InvalidInputError, UnavailableError

LOCAL = "local"
_STORE_BYTES = 256 << 20
_ANSWER_S = 5.0


def ray_module() -> Any:  # noqa: ANN401 - an optional package
    """`ray`.

    Raises:
        InvalidInputError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InvalidInputError("ray", "not installed", "needs Ray: pip install 'greenroom[scale]'") from error
    return ray


@contextmanager
def connected(address: str, *, num_cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected for the length of the block.

    Args:
        address: "local" starts a cluster on this machine; "auto" takes the one that this machine is part of; otherwise
            where one listens, as HOST:PORT or ray://HOST:PORT.
        num_cpus: of a local cluster; None takes all of the machine.

    Raises:
        InvalidInputError: Ray is not installed.
        UnavailableError: nothing answers at the address.
    """
    ray = ray_module()
    _check_listening(address)
    own = {"num_cpus": num_cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **(own if address == LOCAL else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"no Ray cluster at {address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UnavailableError(f"no Ray cluster at {address}: {error.strerror or error}") from error
