"""The device that a user's choice means on this machine.

It knows nothing of what runs there.
Read first: a CUDA device is named with its index, as tensors on it are.
"""

from __future__ import annotations

import torch

from runtime.errors import UnsupportedDeviceError
from runtime.kernels.step_kinds import DeviceKind


def device_of(kind: DeviceKind) -> torch.device:
    """The device to run on.

    Raises:
        UnsupportedDeviceError: "cuda", and torch sees no CUDA device.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(f"device cuda: this build of torch ({torch.__version__}) sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
