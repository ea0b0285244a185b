"""A pytest plugin: one Ray cluster on this machine for all tests that need one.

It knows nothing of what runs there.
Read first: starting a cluster costs seconds, so it lives to the end of the session; who starts actors ends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.scale.cluster import connected

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Where the cluster listens (HOST:PORT); this process is connected to it. It has two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # for Ray's processes
        with connected("local", num_cpus=2) as ray:
            yield str(ray.get_runtime_context().gcs_address)
