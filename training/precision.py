"""In which dtype the frozen base runs during training.

It does not know models or configs beyond the dtype's name.
Read first: trained parameters are float32 whatever is chosen here; only the base changes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from training.config import Dtype

_CPU_INFO = Path("/proc/cpuinfo")
_FAST_BFLOAT16 = re.compile(r"\b(?:avx512_bf16|amx_bf16)\b")


def base_dtype(name: Dtype, device: torch.device, *, cpu_info: Path = _CPU_INFO) -> torch.dtype:
    """The dtype for a name: "auto" is bfloat16 where `device` multiplies it in hardware, else float32.

    On a CPU with AVX512-BF16 a training step takes about a third of its float32 time; without it, longer.

    Args:
        name: "auto", "float32" or "bfloat16".
        device: where the base will lie.
        cpu_info: Linux's description of the CPU; a missing file counts as no support.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        fast = _FAST_BFLOAT16.search(cpu_info.read_text(encoding="utf-8")) is not None
    except OSError:
        fast = False
    return torch.bfloat16 if fast else torch.float32
