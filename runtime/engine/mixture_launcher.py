"""Who launches the mixture kernels on a device: what was compiled ahead of time, else Triton's compiler, else nobody.

It knows nothing of steps.
Read first: None leaves the experts' updates to torch's products, which give the same results.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch

from runtime.errors import UnsupportedDeviceError
from runtime.kernels.triton_launch import CubinLauncher, launcher_for
from runtime.kernels.triton_mixture import Launch, Launcher

_log = logging.getLogger(__name__)


class ExportedFirst:
    """Kernels that were exported, and another launcher for what was not: a later generation may have other ranks.

    Args:
        exported: for one device.
        other: None raises UnsupportedDeviceError for what was not exported.
    """

    def __init__(self, exported: CubinLauncher, other: Launcher | None) -> None:
        self._exported, self._other = exported, other

    def __call__(self, launch: Launch) -> None:
        """Queue one kernel."""
        if self._other is None or self._exported.has(launch.variant):
            self._exported(launch)
        else:
            self._other(launch)


def mixture_launcher(device: torch.device, folder: Path) -> Launcher | None:
    """What launches the mixture kernels; None on a CPU, and where there are neither exported kernels nor Triton.

    Args:
        device: with its index.
        folder: where the generation's artefact of the target `triton` lies, if it was exported.

    Raises:
        ManifestError, DigestMismatchError: the artefact is damaged.
    """
    if device.type != "cuda":
        return None
    exported = None
    if (folder / "manifest.json").is_file():
        try:
            exported = launcher_for(device, folder)
        except UnsupportedDeviceError as error:
            _log.warning("the exported kernels do not run here: %s", error)
    other: Launcher | None = None
    if find_spec("triton") is not None:
        from runtime.kernels.triton_jit import JitLauncher

        other = JitLauncher()
    if exported is None and other is None:
        _log.warning("neither exported kernels nor Triton: experts are added by torch's products")
    return other if exported is None else ExportedFirst(exported, other)
