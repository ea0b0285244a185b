"""The native step as Python sees it: a model of packed weights, and runs of its layers over tensors.

It knows nothing of requests or tasks; `runtime/kernels/native/step.cpp` computes.
Read first: tensors that cross are contiguous float32 or int32 on the CPU and must stay alive for the call; a stage's
tensors must stay alive as long as the stage, which keeps them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import torch

from runtime.errors import BudgetError
from runtime.kernels.inspection import native_inspector
from runtime.kernels.native_mixture import NativeStage, address
from runtime.kernels.step_kinds import KEPT_IN_8_BITS, WeightKind

KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128, 256)
PHASES = (
    *("norm, route, shrink for q k v", "q k v", "rotate, attention", "", "shrink for o", "o"),
    *("norm, route, shrink for gate up", "gate up", "shrink for down", "down"),
)
"""What the native step does in a layer, in this order; products include the expands of their experts."""
_MATRICES = ("qkv", "out", "gate_up", "down", "head")
_VECTORS = ("attention_norm", "ffn_norm", "final_norm", "cos", "sin", "qkv_bias", "q_norm", "k_norm")


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "ffn", "heads", "kv_heads", "head_width")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "context", "threads")),
        ("epsilon", ctypes.c_double),
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of a Llama-family model; see `transformers.LlamaConfig`."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    epsilon: float

    @property
    def native(self) -> bool:
        """Whether the native step can run it: widths in whole vectors of 16, heads of a width that it was made for."""
        return all(size % 16 == 0 for size in (self.width, self.ffn)) and self.head_width in HEAD_WIDTHS


class NativeStep:
    """A model's weights, packed, and the layers that they make.

    Args:
        library: from `runtime.kernels.native_build.build`.
        shape: sizes.
        weights: how matrices are kept. int8 and int4: codes with a float16 scale per output and 64 (int4: 32) inputs,
            and inputs rounded to 8 bits per token and 64 values; int4 is for gate and up; see `KEPT_IN_8_BITS`.
            bfloat16: inputs too are rounded to it. Sums are float32.
        threads: that compute, the caller's among them.

    `inspector` looks at experts that are read meanwhile, on the same threads.
    """

    def __init__(self, library: Path, shape: StepShape, *, weights: WeightKind, threads: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.gr_create.restype = ctypes.c_void_p
        self.shape = shape
        self._kinds = {name: KINDS.index(_kept_as(name, weights)) for name in _MATRICES}
        sizes = {field.name: getattr(shape, field.name) for field in fields(shape)}
        config = _Config(**sizes, threads=threads)
        self._handle = ctypes.c_void_p(self._library.gr_create(ctypes.byref(config)))
        self._cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self.inspector = native_inspector(library, model=self._handle)

    def close(self) -> None:
        """Free the weights and stop the threads, when nobody else uses them any more; idempotent."""
        if self._handle:
            self._library.gr_destroy(self._handle)
            self._handle.value = None  # the inspector's too: it goes on without the team

    def set(self, name: str, layer: int, weight: torch.Tensor, *, place: tuple[int, int] | None = None) -> None:
        """Take over a copy of one weight: a matrix [rows, cols] of `qkv, out, gate_up, down, head`, or a vector.

        Args:
            name: which.
            layer: of which layer.
            weight: all of it; or, where `place` is (first row, rows in all), some of its rows.
            place: rows of a matrix come in ascending pieces, each but the last a multiple of 64.
        """
        rows, cols = weight.shape if weight.dim() == 2 else (1, weight.shape[0])
        first, whole_rows = place or (0, rows)
        which = _MATRICES.index(name) if name in _MATRICES else len(_MATRICES) + _VECTORS.index(name)
        part = weight.detach().to(torch.float32).contiguous()
        whole = (ctypes.c_int64(whole_rows), ctypes.c_int64(cols), self._kinds.get(name, 0))
        handle = (self._handle, which, ctypes.c_int64(layer))
        piece = (ctypes.c_int64(first), ctypes.c_int64(rows))
        self._check(self._library.gr_set(*handle, _pointer(part), *whole, *piece))

    def set_cache(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Use [L, slots, kv heads, context, head width] float32 or bfloat16 tensors as the KV cache."""
        self._cache = (keys, values)
        slots, context = keys.shape[1], keys.shape[3]
        self._library.gr_cache(
            self._handle,
            _pointer(keys),
            _pointer(values),
            *(ctypes.c_int64(n) for n in (slots, context, keys.dtype == torch.bfloat16)),
        )

    def run_layers(
        self,
        hidden: torch.Tensor,
        layers: range,
        positions: torch.Tensor,
        slots: torch.Tensor,
        *,
        stage: NativeStage | None,
        rows: torch.Tensor | None,
        alone: bool,
        record: torch.Tensor | None = None,
    ) -> None:
        """Layers over `hidden` [T, D] float32, in place; positions, slots, rows are [T] int32.

        Args:
            hidden: changed.
            layers: which.
            positions: of each token in its sequence.
            slots: of the cache, changed at the tokens' positions.
            stage: None where no token has experts.
            rows: each token's mixture in the stage.
            alone: no two tokens are of one slot.
            record: [L, T, 1 + 2 * MAX_K] int32, filled where a token has experts: their number, then columns, then
                the bits of their float32 weights.
        """
        self._check(
            self._library.gr_layers(
                self._handle,
                _pointer(hidden),
                *(ctypes.c_int64(n) for n in (hidden.shape[0], layers.start, layers.stop)),
                _pointer(positions),
                _pointer(slots),
                ctypes.byref(stage.raw) if stage else None,
                _pointer(rows) if rows is not None else None,
                int(alone),
                _pointer(record) if record is not None else None,
            )
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`head(norm(hidden))`: [T, D] float32 -> [T, V] float32."""
        out = torch.empty(hidden.shape[0], self.shape.vocabulary)
        self._check(
            self._library.gr_logits(self._handle, _pointer(hidden), ctypes.c_int64(hidden.shape[0]), _pointer(out))
        )
        return out

    def linear(self, name: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """One matrix alone: [T, cols] float32 -> [T, rows] float32."""
        shape = self.shape
        rows = {
            "qkv": (shape.heads + 2 * shape.kv_heads) * shape.head_width,
            "out": shape.width,
            "gate_up": 2 * shape.ffn,
            "down": shape.width,
            "head": shape.vocabulary,
        }
        x = x.contiguous()
        out = torch.empty(x.shape[0], rows[name])
        sizes = (ctypes.c_int64(layer), _pointer(x), ctypes.c_int64(x.shape[0]), _pointer(out))
        self._check(self._library.gr_linear(self._handle, _MATRICES.index(name), *sizes))
        return out

    def phases(self) -> dict[str, float]:
        """Phase -> seconds spent in it over all layers since the last call."""
        seconds = (ctypes.c_double * len(PHASES))()
        self._library.gr_phases(self._handle, seconds)
        return {name: each for name, each in zip(PHASES, seconds, strict=True) if name}

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise BudgetError("the native step got no memory for its weights or buffers")


def _kept_as(name: str, weights: WeightKind) -> WeightKind:
    return "int8" if weights == "int4" and name in KEPT_IN_8_BITS else weights


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(address(tensor))
