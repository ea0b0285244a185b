"""The tensors of a folder's safetensors files, read one at a time.

It knows nothing of models, and reads for one thread at a time.
Read first: `read` copies one tensor from the file into memory of its own, so nothing but what is asked for is ever
resident; `mapped` gives a tensor whose rows come from the file when they are first looked at.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from runtime.errors import UnknownBaseError

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
)
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # as safetensors itself has it
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class _Place:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles:
    """All floating tensors in `folder/*.safetensors`.

    Args:
        folder: of a base model.

    Raises:
        UnknownBaseError: a file is not safetensors, or its header and length disagree.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        self._scratch: torch.Tensor | None = None
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._places |= _places(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnknownBaseError(f"{path.name} is no safetensors file: {error!r}") from error

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None where there is none of that name with a floating dtype."""
        place = self._places.get(name)
        return None if place is None else place.shape

    def read(self, name: str, dtype: torch.dtype, rows: range | None = None) -> torch.Tensor:
        """A copy of one tensor in `dtype`, or of adjacent rows of it; beside it, some megabytes are held meanwhile."""
        place = self._places[name]
        size, row = place.dtype.itemsize, math.prod(place.shape[1:])
        shape = place.shape if rows is None else (len(rows), *place.shape[1:])
        count = math.prod(shape)
        made = torch.empty(count, dtype=dtype)
        with place.path.open("rb", buffering=0) as stream:
            stream.seek(place.begin + (rows.start * row * size if rows else 0))
            for begin in range(0, count, _PIECE_BYTES // size):
                end = min(count, begin + _PIECE_BYTES // size)
                part = made[begin:end] if dtype == place.dtype else self._room(end - begin, place.dtype)
                _fill(stream, part, place.path)
                if dtype != place.dtype:
                    made[begin:end] = part
        return made.view(shape)

    def _room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The same memory every time, for what is read in one dtype and wanted in another."""
        if self._scratch is None:
            self._scratch = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
        return self._scratch[: count * dtype.itemsize].view(dtype)

    def mapped(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, in pages that are read from the file when they are first looked at.

        The file may be removed or replaced meanwhile, but must not be shortened.
        """
        place = self._places[name]
        offset = place.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        before = place.begin - offset
        if before % place.dtype.itemsize:  # header lengths that align nothing
            return self.read(name, place.dtype)
        with place.path.open("rb") as stream:
            # Private and writable, as torch wants its memory; nobody writes.
            pages = mmap.mmap(stream.fileno(), place.end - offset, access=mmap.ACCESS_COPY, offset=offset)
        if hasattr(mmap, "MADV_RANDOM"):
            with suppress(OSError):
                pages.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(pages, dtype=place.dtype, count=math.prod(place.shape), offset=before).view(place.shape)


def _places(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - _LENGTH_BYTES):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    start, places = _LENGTH_BYTES + length, {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        begin, end = entry["data_offsets"]
        place = _Place(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, start + end)
        if end - begin != math.prod(place.shape) * place.dtype.itemsize or not 0 <= begin <= end <= size - start:
            raise ValueError(f"{name}: shape and offsets disagree")
        places[name] = place
    return places


def _fill(stream: object, part: torch.Tensor, path: Path) -> None:
    view = part.view(torch.uint8).numpy().data
    while view:
        got = stream.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise UnknownBaseError(f"{path.name} ends before its tensors do")
        view = view[got:]
