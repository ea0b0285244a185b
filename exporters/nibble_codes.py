"""Weights as 4-bit codes with a scale per block of 32: a seventh of float32, in the form that `MatMulNBits` takes.

It knows nothing of layers or graphs; `exporters.block_codes` has 8 bits.
Read first: `w = (code - 8) * scale`, two codes per byte, the lower half first. A scale is the best of a few candidates
around `max |w| / 8`, of either sign, since the 16 codes reach further down than up.
"""

from __future__ import annotations

import torch

from exporters.block_codes import BLOCK, Codes

BITS = 4
_ZERO = 8
_REACH = (-8.0, -7.5, -7.0, 7.0, 7.5, 8.0)
"""Candidates: the code, less `_ZERO`, that a block's largest weight is given."""


def encode_nibbles(weight: torch.Tensor) -> Codes:
    """Round a matrix [out, in]; per block the candidate scale with the least squared error.

    Returns:
        codes: [out, blocks, 16] uint8; the last block is filled up with 8, which is 0.
        scales: [out, blocks] float32.
    """
    num_rows, width = weight.shape
    blocks = torch.nn.functional.pad(weight.detach().float(), (0, -width % BLOCK)).view(num_rows, -1, BLOCK)
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))  # with its sign
    scales = torch.zeros_like(largest)
    rounded = torch.zeros_like(blocks)
    least = torch.full_like(largest, torch.inf)
    for reach in _REACH:
        scale = largest / reach
        steps = torch.where(scale == 0, 0.0, blocks / scale).round_().clamp_(-_ZERO, _ZERO - 1)
        error = (steps * scale - blocks).square_().sum(2, keepdim=True)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, scale, scales)
        rounded = torch.where(better, steps, rounded)
    codes = (rounded + _ZERO).to(torch.uint8)
    return Codes(codes[..., 0::2] | codes[..., 1::2] << 4, scales.squeeze(2))


def decode_nibbles(coded: Codes, width: int) -> torch.Tensor:
    """The matrix [out, width] that the codes stand for, float32."""
    steps = torch.stack((coded.codes & 15, coded.codes >> 4), dim=3).flatten(2).float() - _ZERO
    return (steps * coded.scales.unsqueeze(2)).flatten(1)[:, :width].contiguous()
