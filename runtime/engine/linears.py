"""The forms in which a base's matrices are kept, and the product with each: `y = W x`.

It knows nothing of models.
Read first: `Keep` turns a weight into a callable once, at load. Rounded forms are for CPUs and use torch's products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from runtime.errors import UnsupportedDeviceError
from runtime.kernels.step_kinds import KEPT_IN_8_BITS

Linear = Callable[[torch.Tensor], torch.Tensor]
Keep = Callable[[str, int, torch.Tensor], Linear]
"""(name of the matrix, layer, weight [H, D]) -> x [T, D] -> y [T, H]."""

_INT4_GROUP = 32
_INT4_TILES = 2


def keep_dense(name: str, layer: int, weight: torch.Tensor) -> Linear:  # noqa: ARG001 - all are kept alike
    """As it is."""
    return partial(linear, weight=weight)


def keep_int8(name: str, layer: int, weight: torch.Tensor) -> Linear:  # noqa: ARG001 - all are kept alike
    """Codes of 8 bits with one scale per output: `W ~ codes * scale`, scale = max |w| / 127; torch's own product."""
    _check_cpu(weight)
    scale = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    codes = torch.round(weight.float() / scale.unsqueeze(1)).to(torch.int8)
    return partial(_int8, codes=codes, scale=scale.to(torch.bfloat16))


def keep_int4(name: str, layer: int, weight: torch.Tensor) -> Linear:
    """Codes of 4 bits with a scale and an offset per 32 inputs; `KEPT_IN_8_BITS` names what gets 8."""
    if name in KEPT_IN_8_BITS or weight.shape[1] % _INT4_GROUP or weight.shape[0] % 16:
        return keep_int8(name, layer, weight)
    _check_cpu(weight)
    groups = weight.float().view(weight.shape[0], -1, _INT4_GROUP)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.round((groups - low.unsqueeze(2)) / scale.unsqueeze(2)).clamp(0, 15).flatten(1).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INT4_TILES)  # noqa: SLF001
    # The product computes (code - 8) * scale + zero.
    parts = torch.stack((scale, low + 8 * scale), dim=2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return partial(_int4, packed=packed, parts=parts)


def _int8(x: torch.Tensor, *, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), codes, scale)  # noqa: SLF001
    return y.to(x.dtype)


def _int4(x: torch.Tensor, *, packed: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    op = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
    y: torch.Tensor = op(x.to(torch.bfloat16), packed, _INT4_GROUP, parts)
    return y.to(x.dtype)


def _check_cpu(weight: torch.Tensor) -> None:
    if weight.device.type != "cpu":
        raise UnsupportedDeviceError(f"rounded weights run on a CPU, not on {weight.device}")
