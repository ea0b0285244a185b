"""The tensors of a small blob that was read whole: by name, as views of one piece of memory.

It knows nothing of files; `runtime.model.repertoire` reads the bytes and checks their digest.
Read first: routers and densities are many tensors of a few kilobytes, and reading one while a prompt waits should cost
little more than hashing it; so nothing is copied, and all numbers are looked at in one go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from runtime.errors import NonFiniteError, TensorMismatchError
from runtime.kernels.inspection import all_finite
from runtime.model.expert import blob_header

_SIZE = 4  # bytes of a float32


def small_tensors(data: bytearray, shapes: Mapping[str, tuple[int, ...]], *, digest: str) -> dict[str, torch.Tensor]:
    """The float32 tensors of a safetensors file, exactly those named in `shapes`.

    Args:
        data: all of the file; the tensors share its memory.
        shapes: of each.
        digest: of the blob, for messages.

    Raises:
        TensorMismatchError: no safetensors file; or a tensor is missing, unexpected, or of another shape or dtype.
        NonFiniteError: a number is NaN or infinite.
    """
    try:
        header, start = blob_header(data)
        found: dict[str, tuple[object, tuple[int, ...]]] = {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
        }
        places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        ends = [0, *sorted(end for _, end in places.values())]
        whole = sorted(begin for begin, _ in places.values()) == ends[:-1] and start + ends[-1] == len(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorMismatchError(f"blob {digest}: not a safetensors file: {error!r}") from error
    wanted: dict[str, tuple[object, tuple[int, ...]]] = {name: ("F32", shape) for name, shape in shapes.items()}
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise TensorMismatchError(f"blob {digest}: {name} is {found.get(name)}, needed is {wanted.get(name)}")
    if not whole or any(end - begin != _SIZE * math.prod(shapes[name]) for name, (begin, end) in places.items()):
        raise TensorMismatchError(f"blob {digest}: its tensors do not lie one after the other")
    if start % _SIZE:  # by a writer that aligns nothing
        data, start = data[start:], 0
    numbers = torch.frombuffer(data, dtype=torch.float32, offset=start) if start < len(data) else torch.empty(0)
    tensors = {
        name: numbers.as_strided(shape, _strides(shape), places[name][0] // _SIZE) for name, shape in shapes.items()
    }
    if not all_finite(numbers):
        name = next(name for name, tensor in tensors.items() if not all_finite(tensor))
        raise NonFiniteError(f"blob {digest}: {name} holds NaN or infinity")
    return tensors


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
