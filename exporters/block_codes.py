"""Weights as 8-bit codes with a scale per block of 32: a quarter of float32, and the form that `MatMulNBits` takes.

It knows nothing of layers or graphs.
Read first: symmetric around the code 128, so a weight of 0 stays 0: `w = (code - 128) * scale`, `scale = max |w| / 127`
over 32 neighbours of one output row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 32
BITS = 8
_ZERO = 128


class Codes(NamedTuple):
    """One weight matrix [out, in].

    Args:
        codes: [out, blocks, 32] uint8; the last block is filled up with 128, which is 0.
        scales: [out, blocks] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def encode(weight: torch.Tensor) -> Codes:
    """Round a matrix [out, in] to codes, each to the nearest."""
    num_rows, width = weight.shape
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -width % BLOCK))
    blocks = padded.view(num_rows, -1, BLOCK)
    scales = blocks.abs().amax(2) / 127
    rounded = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)).round()
    return Codes((rounded.clamp(-127, 127) + _ZERO).to(torch.uint8), scales)


def decode(coded: Codes, width: int) -> torch.Tensor:
    """The matrix [out, width] that the codes stand for, float32."""
    blocks = (coded.codes.float() - _ZERO) * coded.scales.unsqueeze(2)
    return blocks.flatten(1)[:, :width].contiguous()
