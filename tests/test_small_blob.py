"""Small blobs: exactly the tensors that are wanted come out, as views of what was read, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from runtime.errors import NonFiniteError, TensorMismatchError
from runtime.model.small_blob import small_tensors

SHAPES = {"b": (2, 3), "a": (4,), "c": (1, 2, 2)}


def written(header: object, data: bytes, *, aligned: bool = True) -> bytearray:
    """A file in the format of safetensors with any header."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + (0 if aligned else 1))
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> Mapping[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3), max_size=6))
def test_what_was_saved_comes_back_whatever_the_names_and_shapes(sizes: dict[str, list[int]]) -> None:
    shapes = {name: tuple(shape) for name, shape in sizes.items()}
    data = bytearray(save({name: torch.randn(shape) for name, shape in shapes.items()}))
    found = small_tensors(data, shapes, digest="d")
    assert found.keys() == shapes.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in load(bytes(data)).items())


def test_tensors_show_the_bytes_that_were_read_and_are_no_copies() -> None:
    data = bytearray(save({name: torch.zeros(shape) for name, shape in SHAPES.items()}))
    found = small_tensors(data, SHAPES, digest="d")
    data[-4:] = torch.tensor([7.0]).numpy().tobytes()
    assert found["c"].flatten().tolist() == [0, 0, 0, 7], "the last in the file"


def test_numbers_behind_a_header_that_aligns_nothing_are_read_all_the_same() -> None:
    numbers = torch.arange(4.0)
    data = written({"a": entry(0, 16, 4)}, numbers.numpy().tobytes(), aligned=False)
    found = small_tensors(data, {"a": (4,)}, digest="d")["a"]
    assert found.tolist() == [0, 1, 2, 3]
    assert found.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": torch.zeros(4), "b": torch.zeros(2, 3)}, "c is None"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, 3), "c": torch.zeros(1, 2, 2), "d": torch.zeros(1)}, "d is"),
        ({"a": torch.zeros(4), "b": torch.zeros(3, 2), "c": torch.zeros(1, 2, 2)}, "b is"),
        ({"a": torch.zeros(4).half(), "b": torch.zeros(2, 3), "c": torch.zeros(1, 2, 2)}, "a is"),
        ({"a": torch.zeros(4).int(), "b": torch.zeros(2, 3), "c": torch.zeros(1, 2, 2)}, "a is"),
    ],
    ids=["missing", "unexpected", "shape", "half", "integers"],
)
def test_other_tensors_than_wanted_are_refused_by_name(tensors: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(TensorMismatchError, match=f"blob d: {named}"):
        small_tensors(bytearray(save(tensors)), SHAPES, digest="d")


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", bytes(40), b"\xff" * 40], ids=["empty", "pickle", "0", "255"])
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(TensorMismatchError, match="not a safetensors file"):
        small_tensors(bytearray(data), {"a": (4,)}, digest="d")


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": entry(0, 8, 2), "b": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        {"a": entry(0, 8, 2), "b": {"dtype": "F32", "shape": [2], "data_offsets": ["8", 16]}},
    ],
    ids=["list", "number", "nowhere", "shapeless", "endless", "text"],
)
def test_a_header_of_another_form_is_refused(header: object) -> None:
    with pytest.raises(TensorMismatchError, match="not a safetensors file"):
        small_tensors(written(header, bytes(16)), {"a": (2,), "b": (2,)}, digest="d")


@pytest.mark.parametrize(
    "places",
    [
        ((0, 8), (0, 8)),
        ((0, 8), (4, 16)),
        ((0, 8), (12, 20)),
        ((0, 4), (4, 16)),
        ((0, 8), (8, 24)),
        ((4, 12), (12, 16)),
    ],
    ids=str,
)
def test_tensors_that_overlap_leave_gaps_or_have_another_length_are_refused(
    places: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    header = {name: entry(*place, 2) for name, place in zip("ab", places, strict=True)}
    with pytest.raises(TensorMismatchError, match="do not lie one after the other"):
        small_tensors(written(header, bytes(16)), {"a": (2,), "b": (2,)}, digest="d")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_refused_with_its_tensor(value: float) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["b"][1, 2] = value
    with pytest.raises(NonFiniteError, match="blob d: b holds"):
        small_tensors(bytearray(save(tensors)), SHAPES, digest="d")
