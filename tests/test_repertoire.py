"""The repertoire on disk: what is written is read back, each fault has its own error, and a crash loses nothing."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
from children import DiesAt
from repertoires import Workshop

from runtime.errors import (
    BaseMismatchError,
    BlobMissingError,
    BlobTruncatedError,
    DigestMismatchError,
    GenerationMismatchError,
    ManifestError,
    NonFiniteError,
    NotARepertoireError,
    PathEscapeError,
    RepertoireError,
    TensorMismatchError,
    UnknownSchemaError,
)
from runtime.kernels.inspection import Inspector
from runtime.model.attach import fresh_expert
from runtime.model.base import BaseModel
from runtime.model.expert import (
    DTYPES,
    check_header,
    check_tensors,
    is_as_packed,
    pack_expert_set,
    unit_tensors,
)
from runtime.model.generation import base_ref, check_base, open_generation
from runtime.model.manifest import BaseRef, ExpertSet, Manifest
from runtime.model.repertoire import Repertoire


@pytest.fixture
def published(workshop: Workshop) -> Workshop:
    workshop.publish("red", "aaaa")
    return workshop


def blob_path(workshop: Workshop, digest: str) -> Path:
    return workshop.repertoire.root / "blobs" / "sha256" / digest[:2] / digest


def read_first(workshop: Workshop) -> None:
    """Read a unit as a runtime that just started would."""
    manifest = workshop.repertoire.manifest()
    entry = manifest.experts[0]
    Repertoire(workshop.repertoire.root).read_unit(entry, entry.units[0], manifest.base)


def rewrite(workshop: Workshop, **changes: object) -> None:
    """Change top-level fields of the current manifest, behind the writer's back."""
    path = workshop.repertoire.root / "generations" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("picked", [[0], [0, 1, 2, 3], [0, 2, 3], [3, 1]], ids=str)
def test_units_that_are_read_together_have_the_bytes_that_each_has_alone(
    workshop: Workshop, tiny_base: BaseModel, picked: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = base_ref(tiny_base.info)
    experts = {n: fresh_expert(n, rank=2, alpha=4.0, base=base, generator=generator) for n in range(4)}
    blob, entry = pack_expert_set(experts, task="red", dtype="float32", base=base)
    path = workshop.repertoire.blob_path(entry.digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(blob)
    units = [entry.units[n] for n in picked]
    found = workshop.repertoire.read_units(entry, units, base)
    assert [bytes(each.data) for each in found] == [blob[unit.offset : unit.offset + unit.bytes] for unit in units]


def test_one_expert_is_one_contiguous_read_and_comes_back_as_it_was(workshop: Workshop) -> None:
    manifest = workshop.publish("red", "aaaa", rank=4)
    entry = manifest.experts[0]
    for unit in entry.units:
        expert = workshop.repertoire.read_unit(entry, unit, manifest.base)
        sizes = {
            name: shape[0] * shape[1] for name, shape in unit_tensors(unit.ranks, manifest.base, entry.layout).items()
        }
        assert unit.bytes == 4 * sum(sizes.values())
        packed, again = pack_expert_set({unit.layer: expert}, task="red", dtype="float32", base=manifest.base)
        assert again.units[0].sha256 == unit.sha256
        assert packed[again.units[0].offset :][: unit.bytes] == bytes(
            blob_path(workshop, entry.digest).read_bytes()[unit.offset :][: unit.bytes]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_is_the_same_whichever_way_its_b_lies_in_the_blob(
    workshop: Workshop, tiny_base: BaseModel, dtype: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = base_ref(tiny_base.info)
    expert = fresh_expert(2, rank=3, alpha=6.0, base=base, generator=generator)
    for update in expert.updates.values():
        update.b.normal_(generator=generator)
    found = {}
    for layout in ("plain", "rows"):
        blob, entry = pack_expert_set({2: expert}, task="red", dtype=dtype, base=base, layout=layout)  # type: ignore[arg-type]
        path = workshop.repertoire.blob_path(entry.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        found[layout] = workshop.repertoire.read_unit(entry, entry.units[0], base)
    for target, update in expert.updates.items():
        for read in found.values():
            assert torch.equal(read.updates[target].a, update.a.to(DTYPES[dtype]))
            assert torch.equal(read.updates[target].b, update.b.to(DTYPES[dtype]))
        assert found["plain"].updates[target].b.is_contiguous()
        assert found["rows"].updates[target].b.t().is_contiguous(), "kernels read it where it lies"


def test_a_blob_whose_b_lies_the_other_way_than_declared_is_rejected(workshop: Workshop) -> None:
    manifest = workshop.publish("red", "aaaa")
    entry = manifest.experts[0]
    assert entry.layout == "rows"
    wrong = entry.model_copy(update={"layout": "plain"})
    with pytest.raises(TensorMismatchError, match=r"layer\.0002\.\w+\.b"):
        Repertoire(workshop.repertoire.root).read_unit(wrong, wrong.units[0], manifest.base)


def test_a_manifest_that_does_not_say_how_b_lies_means_the_old_way(published: Workshop) -> None:
    manifest = json.loads(published.repertoire.manifest().to_json())
    for entry in manifest["experts"]:
        del entry["layout"]
    assert [entry.layout for entry in Manifest.model_validate_json(json.dumps(manifest)).experts] == ["plain"]


def test_a_manifest_reads_back_equal_and_names_only_what_is_there(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert all(blob_path(published, digest).is_file() for digest in manifest.blob_digests())


def test_a_truncated_blob_is_reported_as_such(published: Workshop) -> None:
    path = blob_path(published, published.repertoire.manifest().experts[0].digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BlobTruncatedError, match="the manifest says"):
        read_first(published)


def test_a_flipped_bit_is_a_wrong_digest(published: Workshop) -> None:
    entry = published.repertoire.manifest().experts[0]
    path = blob_path(published, entry.digest)
    data = bytearray(path.read_bytes())
    data[entry.units[0].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatchError, match="layer 2"):
        read_first(published)


def test_a_missing_blob_is_reported_as_such(published: Workshop) -> None:
    blob_path(published, published.repertoire.manifest().experts[0].digest).unlink()
    with pytest.raises(BlobMissingError, match="of task red"):
        read_first(published)


def test_a_blob_that_holds_other_tensors_than_declared_is_rejected(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    entry = manifest.experts[0]
    unit = entry.units[0].model_copy(update={"ranks": {"gate": 4, "up": 5, "down": 3}})
    wrong = entry.model_copy(update={"units": (unit, *entry.units[1:])})
    with pytest.raises(TensorMismatchError, match=r"layer\.0002"):
        Repertoire(published.repertoire.root).read_unit(wrong, unit, manifest.base)


def test_a_file_that_is_no_safetensors_is_rejected(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    entry = manifest.experts[0]
    path = blob_path(published, entry.digest)
    path.write_bytes(b"\x80\x04\x95" + bytes(entry.bytes - 3))  # how a pickle begins
    with pytest.raises(TensorMismatchError, match="a header of"):
        read_first(published)


def header_of(workshop: Workshop) -> tuple[bytes, ExpertSet, BaseRef]:
    """The JSON of the first blob as it was written, and what the manifest says of it."""
    manifest = workshop.repertoire.manifest()
    entry = manifest.experts[0]
    data = blob_path(workshop, entry.digest).read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")], entry, manifest.base


def respaced(header: bytes) -> bytes:
    """The same JSON as another writer might space it, in as many bytes, so that all places stay as they are."""
    return json.dumps(json.loads(header), separators=(",", ":"), sort_keys=True).encode().ljust(len(header))


def test_a_header_is_understood_however_it_is_spelt(published: Workshop) -> None:
    header, entry, base = header_of(published)
    check_header(header, entry, base)
    assert respaced(header) != header
    check_header(respaced(header), entry, base)


@pytest.mark.parametrize("spell", [lambda header: header, respaced], ids=["as written", "otherwise"])
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b'"F32"', b'"I32"', "layer.0002.down.a"),
        (b"layer.0002.gate.a", b"layer.0002.gate.x", "layer.0002.gate.a"),
        (b'"__metadata__":{', b'"some.tensor_":{', "some.tensor_"),
    ],
)
def test_a_header_that_says_something_else_is_refused_in_any_spelling(
    published: Workshop, old: bytes, new: bytes, named: str, spell: Callable[[bytes], bytes]
) -> None:
    header, entry, base = header_of(published)
    changed = header.replace(old, new, 1)
    assert changed != header
    with pytest.raises(TensorMismatchError, match=named):
        check_header(spell(changed), entry, base)


def test_no_changed_byte_passes_for_what_was_packed_that_taking_it_apart_would_refuse(published: Workshop) -> None:
    header, entry, base = header_of(published)
    assert is_as_packed(header, entry, base)
    assert not is_as_packed(respaced(header), entry, base), "its keys come in another order"
    begin, rng, taken = header.index(b'"layer.'), random.Random(0), 0
    for place in range(len(header)):
        changed = bytearray(header)
        changed[place] = rng.choice(b' ,:"{}[]0123456789_ax')
        if changed != header and is_as_packed(changed, entry, base):
            taken += 1
            assert place < begin, "only metadata may be otherwise"
            check_tensors(changed, entry, base)
    assert taken > 0


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"\xff", b"1"])
def test_a_header_that_is_no_object_is_refused(published: Workshop, header: bytes) -> None:
    with pytest.raises(TensorMismatchError, match="not JSON"):
        check_header(header, *header_of(published)[1:])


def test_weights_that_are_not_finite_cannot_be_written_nor_read(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    entry, unit = manifest.experts[0], manifest.experts[0].units[0]
    expert = published.repertoire.read_unit(entry, unit, manifest.base)
    expert.updates["gate"].a[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 2 gate\.a"):
        pack_expert_set({2: expert}, task="red", dtype="float32", base=manifest.base)
    big = expert.updates["gate"].a
    big[0, 0] = 1e30
    with pytest.raises(NonFiniteError):
        pack_expert_set({2: expert}, task="red", dtype="float16", base=manifest.base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_found_in_every_dtype_wherever_it_stands(
    published: Workshop, dtype: Literal["float32", "bfloat16", "float16"], value: float
) -> None:
    manifest = published.repertoire.manifest()
    expert = published.repertoire.read_unit(manifest.experts[0], manifest.experts[0].units[0], manifest.base)
    for update in expert.updates.values():
        update.a.fill_(torch.finfo(DTYPES[dtype]).max)  # the largest that is a number
    blob, entry = pack_expert_set({2: expert}, task="red", dtype=dtype, base=manifest.base)
    unit = entry.units[0]
    data = memoryview(bytearray(blob[unit.offset : unit.offset + unit.bytes]))
    (whole,) = Inspector().look([data], DTYPES[dtype])
    read = published.repertoire.read_unit(entry, unit, manifest.base, data=whole)
    assert read.updates["gate"].a.isfinite().all()
    torch.frombuffer(data, dtype=DTYPES[dtype])[-1] = value
    (bad,) = Inspector().look([data], DTYPES[dtype])
    with pytest.raises(NonFiniteError, match="layer 2"):
        published.repertoire.read_unit(entry, unit.model_copy(update={"sha256": bad.sha256}), manifest.base, data=bad)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schema_version": 99}, UnknownSchemaError, "schema_version=99"),
        ({"tasks": "none"}, ManifestError, "tasks"),
        ({"surprise": 1}, ManifestError, "surprise"),
        ({"generation": 7}, ManifestError, "the file name says 1"),
        ({"first_layer": 40}, ManifestError, "first_layer=40"),
    ],
)
def test_a_bad_manifest_is_named_with_its_field(
    published: Workshop, changes: dict[str, object], error: type[RepertoireError], message: str
) -> None:
    rewrite(published, **changes)
    with pytest.raises(error, match=message):
        published.repertoire.manifest()


def test_a_task_whose_router_is_gone_is_quarantined_and_the_others_are_unharmed(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    blob_path(three_tasks, manifest.task("green").router.digest).unlink()
    generation = open_generation(three_tasks.repertoire)
    assert set(generation.mixtures) == {"red", "blue"}
    assert generation.locator.tasks == ("red", "blue")
    with pytest.raises(BlobMissingError):
        generation.mixture("green")


def test_a_server_opens_a_generation_without_its_densities_and_finds_a_bad_one_when_it_locates(
    three_tasks: Workshop,
) -> None:
    manifest = three_tasks.repertoire.manifest()
    blob_path(three_tasks, manifest.task("green").locator.digest).unlink()
    generation = open_generation(three_tasks.repertoire, routers=False)
    assert not generation.densities.are_read
    assert generation.faults == {}
    assert generation.mixture("green").task == "green", "asked for by name it needs no density"
    assert generation.arrival.tasks == generation.locator.tasks == ("red", "blue")
    assert generation.densities.are_read
    with pytest.raises(BlobMissingError):
        generation.mixture("green")


def test_the_densities_are_read_once_however_many_ask_at_once(three_tasks: Workshop) -> None:
    generation = open_generation(three_tasks.repertoire, routers=False)
    with ThreadPoolExecutor(8) as pool:
        locators = list(pool.map(lambda _: generation.densities.locators(), range(8)))
    assert all(pair is locators[0] for pair in locators)


def test_names_never_leave_the_folder(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    entry = ExpertSet.model_construct(**{**dict(manifest.experts[0]), "digest": "../../etc/passwd"})
    with pytest.raises(PathEscapeError, match="64 hexadecimal digits"):
        published.repertoire.read_unit(entry, entry.units[0], manifest.base)


def test_another_base_is_refused(published: Workshop, tiny_base: BaseModel) -> None:
    manifest = published.repertoire.manifest()
    check_base(manifest, tiny_base.info)
    other = manifest.model_copy(update={"base": manifest.base.model_copy(update={"digest": "f" * 64})})
    with pytest.raises(BaseMismatchError, match="digest is"):
        check_base(other, tiny_base.info)


def test_an_empty_folder_is_no_repertoire_and_a_broken_head_is_reported(tmp_path: Path, published: Workshop) -> None:
    with pytest.raises(NotARepertoireError, match="no HEAD"):
        Repertoire(tmp_path).manifest()
    with pytest.raises(NotARepertoireError, match="generation 9"):
        published.repertoire.manifest(9)
    (published.repertoire.root / "HEAD").write_text("../1\n")
    with pytest.raises(ManifestError, match="expected a generation number"):
        published.repertoire.head()


def test_the_second_of_two_writers_gets_a_mismatch_and_changes_nothing(published: Workshop) -> None:
    manifest = published.repertoire.manifest()
    with pytest.raises(GenerationMismatchError, match="generation 1 was made on None, current is 1"):
        published.repertoire.publish(manifest, published.blobs, expected=None)
    assert published.repertoire.manifest() == manifest


def test_a_manifest_without_its_blobs_cannot_be_published(workshop: Workshop, tmp_path: Path) -> None:
    manifest = workshop.publish("red", "aaaa")
    with pytest.raises(BlobMissingError, match="neither on disk nor published"):
        Repertoire(tmp_path / "elsewhere").publish(manifest, {}, expected=None)
    assert Repertoire(tmp_path / "elsewhere").head() is None


def test_killed_at_any_step_of_a_publish_the_previous_generation_stays_and_the_next_publish_works(
    workshop: Workshop, tmp_path: Path
) -> None:
    first = workshop.publish("red", "aaaa")
    blobs = dict(workshop.blobs)
    second = workshop.publish("green", "1234")
    new = {digest: workshop.blobs[digest] for digest in workshop.blobs.keys() - blobs.keys()}
    num_steps = 3 * (len(new) + 2)
    for deadly in range(num_steps):
        root = tmp_path / f"killed-{deadly}"
        Repertoire(root).publish(first, blobs, expected=None)
        if not (child := os.fork()):
            Repertoire(root, on_step=DiesAt(deadly)).publish(second, new, expected=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"step {deadly} was not reached"
        survivor = Repertoire(root)
        landed = survivor.head()
        assert landed == (2 if deadly == num_steps - 1 else 1)
        assert open_generation(survivor).faults == {}
        if landed == 1:
            survivor.publish(second, new, expected=1)
        assert survivor.manifest() == second
