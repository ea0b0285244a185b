"""An expert: the LoRA update of one layer's linears, and its bytes in a blob.

It knows nothing of files; `runtime.model.repertoire` reads and writes the bytes that are made and parsed here.
Read first: a blob is a safetensors file whose tensors are sorted by layer, so that one expert is one contiguous range.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

from runtime.errors import NonFiniteError, TensorMismatchError
from runtime.model.layer_names import layer_names
from runtime.model.manifest import FFN_TARGETS, TARGETS, BaseRef, ExpertSet, Layout, Target, Unit

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_Place = tuple[tuple[int, int], tuple[int, int], int]  # shape, strides, first element
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class LowRank:
    """One linear's update `scale * B A x`: `a` is A [R, in]; `b` is B [out, R], often the transpose of a [R, out]."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Expert:
    """The update of one layer: `y += scale * B A x` inside those linears that have one (LoRA, arXiv 2106.09685)."""

    layer: int
    scale: float
    updates: Mapping[Target, LowRank]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for update in self.updates.values() for tensor in (update.a, update.b))

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel() for update in self.updates.values() for tensor in (update.a, update.b))


def linear_widths(target: Target, base: BaseRef) -> tuple[int, int]:
    """Input and output width of a linear.

    Raises:
        TensorMismatchError: the architecture has no such linear; or it is one of attention, and the record of the base
            lacks its widths.
    """
    known = layer_names(base.architecture).targets
    if target not in known:
        raise TensorMismatchError(f"target {target}: {base.architecture} has {', '.join(known)}")
    if target in FFN_TARGETS:
        return (base.ffn_width, base.width) if target == "down" else (base.width, base.ffn_width)
    if base.attention_width is None or base.kv_width is None:
        raise TensorMismatchError(f"target {target}: base {base.name} is recorded without attention_width")
    if target == "o":
        return base.attention_width, base.width
    return base.width, base.attention_width if target == "q" else base.kv_width


def unit_tensors(ranks: Mapping[Target, int], base: BaseRef, layout: Layout) -> dict[str, tuple[int, int]]:
    """Return name within the unit -> shape, in the order of the bytes on disk (sorted by name)."""
    shapes: dict[str, tuple[int, int]] = {}
    for target in sorted(ranks):
        wide, narrow = linear_widths(target, base)
        shapes[f"{target}.a"] = (ranks[target], wide)
        name, shape = ("b", (narrow, ranks[target])) if layout == "plain" else ("bt", (ranks[target], narrow))
        shapes[f"{target}.{name}"] = shape
    return shapes


def pack_expert_set(
    experts: Mapping[int, Expert], *, task: str, dtype: str, base: BaseRef, layout: Layout = "rows"
) -> tuple[bytes, ExpertSet]:
    """Serialise the experts of a task, one per layer, and describe the result.

    Args:
        experts: layer -> expert; all with one scale.
        task: the task that trained them; part of the identity.
        dtype: storage dtype, a key of `DTYPES`.
        base: shapes are checked against it.
        layout: of every B in the blob.

    Returns:
        the blob's bytes, and its entry for the manifest.

    Raises:
        TensorMismatchError: a shape does not fit the base, or the scales differ.
        NonFiniteError: a weight is NaN or infinite, or becomes so in `dtype`.
    """
    scales = {expert.scale for expert in experts.values()}
    if len(scales) != 1:
        raise TensorMismatchError(f"expert set of {task}: one scale for all layers is needed, got {sorted(scales)}")
    tensors: dict[str, torch.Tensor] = {}
    for layer, expert in experts.items():
        shapes = unit_tensors({target: update.rank for target, update in expert.updates.items()}, base, layout)
        for name, shape in shapes.items():
            target, side = name.split(".")
            update = expert.updates[target]  # type: ignore[index]
            tensor = {"a": update.a, "b": update.b, "bt": update.b.t()}[side]
            if tuple(tensor.shape) != shape:
                raise TensorMismatchError(f"layer {layer} {name}: shape {tuple(tensor.shape)}, the base needs {shape}")
            stored = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
            if not torch.isfinite(stored).all():
                raise NonFiniteError(f"expert set of {task}: layer {layer} {name} holds NaN or infinity")
            tensors[f"layer.{layer:04d}.{name}"] = stored
    scale = scales.pop()
    # The configuration is part of the bytes, hence of the identity; under one key, since their order is not kept.
    config = json.dumps({"kind": "expert_set", "scale": scale, "task": task}, sort_keys=True)
    blob = save(tensors, metadata={"greenroom": config})
    digest = hashlib.sha256(blob).hexdigest()
    units = tuple(_unit(blob, layer, experts[layer]) for layer in sorted(experts))
    entry = ExpertSet(
        digest=digest,
        task=task,
        bytes=len(blob),
        dtype=dtype,  # type: ignore[arg-type]
        scale=scale,
        units=units,
        layout=layout,
    )
    return blob, entry


def _unit(blob: bytes, layer: int, expert: Expert) -> Unit:
    header, data_start = blob_header(blob)
    ranges = [entry["data_offsets"] for name, entry in header.items() if name.startswith(f"layer.{layer:04d}.")]
    start, end = min(begin for begin, _ in ranges), max(end for _, end in ranges)
    assert end - start == sum(stop - begin for begin, stop in ranges), "tensors of one layer must be contiguous"
    data = blob[data_start + start : data_start + end]
    return Unit(
        layer=layer,
        ranks={target: expert.updates[target].rank for target in TARGETS if target in expert.updates},
        offset=data_start + start,
        bytes=end - start,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def blob_header(blob: bytes | bytearray) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return the tensor entries of a safetensors blob and the offset at which tensor data begin."""
    start = 8 + int.from_bytes(blob[:8], "little")
    return _entries(blob[8:start]), start


def check_header(header: bytes | bytearray, entry: ExpertSet, base: BaseRef) -> None:
    """Check that a blob holds exactly the tensors that its manifest entry declares, where it declares them.

    Args:
        header: the JSON of the blob.
        entry: what the manifest says of it.
        base: shapes follow from it.

    Raises:
        TensorMismatchError: it is no JSON, or a tensor is missing, unexpected, or of another dtype, shape or place.
    """
    if not is_as_packed(header, entry, base):
        check_tensors(header, entry, base)


def is_as_packed(header: bytes | bytearray, entry: ExpertSet, base: BaseRef) -> bool:
    """Whether a header is, byte for byte, what `pack_expert_set` writes of such a set, whatever its metadata.

    False says nothing; true spares taking it apart, which is a good part of a load that a prompt waits for.
    """
    text = bytes(header).rstrip(b" ")
    begin = text.find(b'"layer.')
    try:
        others = json.loads(text[:begin].removesuffix(b",") + b"}")
        places = _declared(entry, base, 8 + len(header))
    except (ValueError, TensorMismatchError):
        return False
    form = f'":{{"dtype":"{_SAFETENSORS_DTYPES[entry.dtype]}","shape":['
    tensors = [f'"{name}{form}{r},{c}],"data_offsets":[{start},{end}]}}' for name, (r, c), start, end in places]
    written = (",".join(tensors) + "}").encode()
    return isinstance(others, dict) and others.keys() <= {"__metadata__"} and text[begin:] == written


def check_tensors(header: bytes | bytearray, entry: ExpertSet, base: BaseRef) -> None:
    """As `check_header`, of a header that anybody may have written."""
    try:
        tensors = _entries(header)
    except (ValueError, TypeError, AttributeError) as error:
        raise TensorMismatchError(f"blob {entry.digest}: the header is not JSON") from error
    dtype = _SAFETENSORS_DTYPES[entry.dtype]
    expected: dict[str, dict[str, object]] = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        for name, shape, start, end in _declared(entry, base, 8 + len(header))
    }
    for name in sorted(expected.keys() | tensors.keys()):
        if tensors.get(name) != expected.get(name):
            raise TensorMismatchError(
                f"expert set {entry.digest}: {name} is {tensors.get(name)}, the manifest says {expected.get(name)}"
            )


def _declared(entry: ExpertSet, base: BaseRef, data_start: int) -> list[tuple[str, tuple[int, int], int, int]]:
    """Name, shape, begin and end of every tensor of a set, in the order of the bytes."""
    size = DTYPES[entry.dtype].itemsize
    declared: list[tuple[str, tuple[int, int], int, int]] = []
    forms: dict[object, list[tuple[str, tuple[int, int], int]]] = {}  # layers mostly have the same ranks
    for unit in entry.units:
        ranks = tuple(unit.ranks.items())
        if ranks not in forms:
            shapes = unit_tensors(unit.ranks, base, entry.layout)
            forms[ranks] = [(name, shape, math.prod(shape) * size) for name, shape in shapes.items()]
        position, layer = unit.offset - data_start, f"layer.{unit.layer:04d}."
        for name, shape, num_bytes in forms[ranks]:
            declared.append((layer + name, shape, position, position + num_bytes))
            position += num_bytes
        if position != unit.offset - data_start + unit.bytes:
            raise TensorMismatchError(f"expert set {entry.digest}: layer {unit.layer} declares {unit.bytes} bytes")
    return declared


def _entries(header: bytes | bytearray) -> dict[str, dict[str, list[int]]]:
    """The tensors in the JSON of a safetensors header."""
    tensors: dict[str, dict[str, list[int]]] = json.loads(header)
    tensors.pop("__metadata__", None)
    return tensors


def _places(unit: Unit, entry: ExpertSet, base: BaseRef) -> list[tuple[Target, _Place, _Place]]:
    places: dict[Target, tuple[_Place, _Place]] = {}
    position = 0
    for target in sorted(unit.ranks):
        rank, (wide, narrow) = unit.ranks[target], linear_widths(target, base)
        strides = (rank, 1) if entry.layout == "plain" else (1, narrow)
        a, b = ((rank, wide), (wide, 1), position), ((narrow, rank), strides, position + rank * wide)
        places[target] = (a, b)
        position += rank * (wide + narrow)
    return [(target, *places[target]) for target in unit.ranks]


class UnitForm:
    """How the bytes of a unit are read as an expert; made once, it saves every later read the arithmetic.

    Args:
        unit: of which set.
        entry: that set.
        base: widths follow from it.
        like: the form of another unit of the set; where ranks are the same, it saves the arithmetic too.

    `unit` is the first of these, `places` says where in its bytes, in numbers of `dtype`, A and B of each target lie.
    """

    def __init__(self, unit: Unit, entry: ExpertSet, base: BaseRef, *, like: UnitForm | None = None) -> None:
        self.unit, self._scale = unit, entry.scale
        self.dtype, self.layout = DTYPES[entry.dtype], entry.layout
        same = like is not None and like.unit.ranks == unit.ranks
        self.places: list[tuple[Target, _Place, _Place]] = (
            like.places if like is not None and same else _places(unit, entry, base)
        )

    def expert(self, data: memoryview) -> Expert:
        """Return the expert in the bytes of the unit; its tensors share memory with `data`, and keep it alive."""
        return Expert(layer=self.unit.layer, scale=self._scale, updates=UnitUpdates(data, self))


class UnitUpdates(Mapping[Target, LowRank]):
    """The updates in the bytes of a unit; tensors are made when somebody asks, for who knows addresses needs none.

    Args:
        data: those bytes.
        form: how they are read.
    """

    def __init__(self, data: memoryview, form: UnitForm) -> None:
        self.data, self.form = data, form
        self._made: dict[Target, LowRank] | None = None

    def __getitem__(self, target: Target) -> LowRank:
        if self._made is None:
            flat = torch.frombuffer(self.data, dtype=self.form.dtype)
            places = self.form.places
            self._made = {target: LowRank(flat.as_strided(*a), flat.as_strided(*b)) for target, a, b in places}
        return self._made[target]

    def __iter__(self) -> Iterator[Target]:
        return (target for target, _, _ in self.form.places)

    def __len__(self) -> int:
        return len(self.form.places)
