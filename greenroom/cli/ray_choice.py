"""Which Ray cluster a command uses, and how much of it.

It knows nothing of Ray.
Read first: these are the defaults of the flags, too.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RayChoice:
    """What `--ray` and its companions say.

    Args:
        address: "local", "auto", or HOST:PORT.
        num_workers: each with its own engine.
        num_gpus: of each worker.
    """

    address: str = "local"
    num_workers: int = 2
    num_gpus: float = 0.0


RAY = RayChoice()
