"""A repertoire's life: roll back, collect, audit, compare; and what crashes, full disks and others do to it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from children import DiesAt, Gate, child
from repertoires import Workshop
from safetensors.torch import save

from runtime.errors import (
    BlobMissingError,
    BlobTruncatedError,
    DigestMismatchError,
    GenerationMismatchError,
    InvalidInputError,
    ManifestError,
    NotARepertoireError,
    UnknownSchemaError,
)
from runtime.model.audit import audit
from runtime.model.collect import collect
from runtime.model.density import background_shapes
from runtime.model.difference import compare
from runtime.model.durable import write_durably
from runtime.model.generation import open_generation
from runtime.model.inventory import list_generations, list_tasks
from runtime.model.lease import shared_lease, sole_lease
from runtime.model.manifest import Manifest
from runtime.model.repertoire import Repertoire

NO_SPACE = 28


def files_of(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {".writer-lock"}


def bytes_of(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in files_of(root)}


def publish_orphan(workshop: Workshop) -> Manifest:
    """Let the current generation need nothing of blue, so that blue's blobs can be collected."""
    return workshop.repertoire.rollback(expected=3, to=2)


def read_all(repertoire: Repertoire, number: int) -> int:
    manifest = repertoire.manifest(number)
    return sum(
        repertoire.read_unit(entry, unit, manifest.base).num_bytes for entry in manifest.experts for unit in entry.units
    )


# ---- rollback


def test_a_rollback_is_a_new_generation_with_the_content_of_an_old_one(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    before = bytes_of(repertoire.root)
    manifest = repertoire.rollback(expected=3, to=1)
    assert (manifest.generation, manifest.parent) == (4, 3)
    assert repertoire.manifest() == manifest
    assert manifest.model_copy(update={"generation": 1, "parent": None}) == repertoire.manifest(1)
    after = bytes_of(repertoire.root)
    assert after.keys() - before.keys() == {"generations/000004.json"}
    assert {name for name in before if after[name] != before[name]} == {"HEAD"}


def test_a_rollback_that_expected_another_generation_changes_nothing(three_tasks: Workshop) -> None:
    before = bytes_of(three_tasks.repertoire.root)
    with pytest.raises(GenerationMismatchError, match="current is 3"):
        three_tasks.repertoire.rollback(expected=2, to=1)
    with pytest.raises(InvalidInputError, match="to=3"):
        three_tasks.repertoire.rollback(expected=3, to=3)
    with pytest.raises(NotARepertoireError, match="generation 8 is not here"):
        three_tasks.repertoire.rollback(expected=9, to=8)
    assert bytes_of(three_tasks.repertoire.root) == before


def test_a_manifest_whose_parent_is_not_what_it_is_published_on_is_refused(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest().model_copy(update={"generation": 4, "parent": 1})
    with pytest.raises(GenerationMismatchError, match="generation 4 was made on 1, current is 3"):
        three_tasks.repertoire.publish(manifest, {}, expected=3)


# ---- collection


def test_collection_keeps_the_newest_and_all_that_they_need(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    publish_orphan(three_tasks)
    blue_only = repertoire.manifest(3).blob_digests() - repertoire.manifest(4).blob_digests()
    done = collect(repertoire, keep=1)
    assert (done.kept, done.held, done.removed) == ((4,), (), (1, 2, 3))
    assert done.num_blobs == len(blue_only) >= 3
    assert repertoire.generations() == (4,)
    assert not any(repertoire.blob_path(digest).exists() for digest in blue_only)
    assert audit(repertoire, [4]).faults == ()
    with pytest.raises(NotARepertoireError, match="generation 3 was collected"):
        repertoire.manifest(3)


def test_an_audit_reads_the_background_too(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    before = repertoire.manifest(3)
    data = save({name: torch.ones(shape) for name, shape in background_shapes().items()})
    digest = hashlib.sha256(data).hexdigest()
    against = before.locator.model_copy(update={"density": "gaussian", "background": digest})
    manifest = before.model_copy(update={"generation": 4, "parent": 3, "locator": against})
    repertoire.publish(manifest, {digest: data}, expected=3)
    assert [fault for fault in audit(repertoire, [4]).faults if fault.where == "locator background"] == []
    repertoire.blob_path(digest).write_bytes(data[:-1] + b"!")
    faults = [fault.error for fault in audit(repertoire, [4]).faults if fault.where == "locator background"]
    assert [type(error) for error in faults] == [DigestMismatchError]


def test_a_dry_run_says_the_same_and_changes_nothing(three_tasks: Workshop) -> None:
    publish_orphan(three_tasks)
    before = bytes_of(three_tasks.repertoire.root)
    promised = collect(three_tasks.repertoire, keep=1, dry_run=True)
    assert bytes_of(three_tasks.repertoire.root) == before
    assert collect(three_tasks.repertoire, keep=1) == promised
    assert promised.freed_bytes > 0


def test_collection_removes_old_leftovers_of_crashed_writers_and_no_young_ones(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root
    manifest = three_tasks.repertoire.manifest()
    old = [root / ".partial-a", root / "generations/.partial-b", three_tasks.repertoire.blob_path("ab" * 32)]
    old[2] = old[2].with_name(".partial-c")
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (0, time.time() - 7200))
    young = root / "generations/.partial-young"
    young.write_bytes(b"half")
    never_published = root / "generations/000004.json"
    never_published.write_bytes(manifest.model_copy(update={"generation": 4, "parent": 3}).to_json())
    (root / "generations/000009.sig").write_bytes(b"over a manifest that never came")
    done = collect(three_tasks.repertoire, keep=3, grace_s=3600)
    assert (done.num_leftovers, done.removed) == (3, (4,))
    assert [path for path in (*old, never_published) if path.exists()] == []
    assert young.exists()
    assert files_of(root / "generations") == {"000001.json", "000002.json", "000003.json", ".partial-young"}
    assert audit(three_tasks.repertoire, [1, 2, 3]).faults == ()


def test_collection_stops_before_it_would_guess(three_tasks: Workshop, tmp_path: Path) -> None:
    root = three_tasks.repertoire.root
    with pytest.raises(InvalidInputError, match="keep=0"):
        collect(three_tasks.repertoire, keep=0)
    with pytest.raises(NotARepertoireError, match="no HEAD"):
        collect(Repertoire(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    (root / "generations/000002.json").write_text("{}")
    before = bytes_of(root)
    with pytest.raises(UnknownSchemaError, match=r"000002\.json"):
        collect(three_tasks.repertoire, keep=2)
    (root / "generations/000003.json").unlink()
    del before["generations/000003.json"]
    with pytest.raises(NotARepertoireError, match="generation 3"):
        collect(three_tasks.repertoire, keep=1)
    assert bytes_of(root) == before


def test_killed_at_any_step_a_collection_harms_nothing_and_the_next_one_finishes(three_tasks: Workshop) -> None:
    publish_orphan(three_tasks)
    original = bytes_of(three_tasks.repertoire.root)
    collect(three_tasks.repertoire, keep=1)
    wanted = files_of(three_tasks.repertoire.root)
    deadly, killed = 0, True
    while killed:
        root = three_tasks.repertoire.root.with_name(f"killed-{deadly}")
        for name, data in original.items():
            write_durably(root / name, data, kind="copy")

        def work(_gate: Gate, root: Path = root, deadly: int = deadly) -> int:
            collect(Repertoire(root), keep=1, on_step=DiesAt(deadly))
            return 0

        with child(work) as process:
            killed = process.end() == -signal.SIGKILL
        survivor = Repertoire(root)
        assert survivor.head() == 4
        assert audit(survivor, survivor.generations()).faults == ()
        collect(survivor, keep=1, grace_s=0)
        assert files_of(root) == wanted
        deadly += 1
    assert deadly > 15


def test_a_generation_that_another_process_holds_is_not_collected_until_it_lets_go(three_tasks: Workshop) -> None:
    publish_orphan(three_tasks)
    root = three_tasks.repertoire.root

    def reader(gate: Gate) -> int:
        repertoire = Repertoire(root)
        with repertoire.hold_generation(3) as number:
            gate.reached()
            return 0 if read_all(repertoire, number) else 1

    with child(reader) as process:
        process.wait_reached()
        done = collect(Repertoire(root), keep=1)
        assert (done.kept, done.held, done.removed) == ((4,), (3,), (1, 2))
        process.go_on()
        assert process.end() == 0
    assert collect(Repertoire(root), keep=1).removed == (3,)


def test_a_killed_reader_holds_nothing(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root

    def reader(gate: Gate) -> int:
        with Repertoire(root).hold_generation(1):
            gate.reached()
        return 0

    with child(reader) as process:
        process.wait_reached()
        process.kill()
        process.end()
    assert collect(Repertoire(root), keep=1).removed == (1, 2)


def test_what_was_collected_cannot_be_held_and_the_current_generation_always_can(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    collect(repertoire, keep=1)
    with pytest.raises(NotARepertoireError, match="was collected"), repertoire.hold_generation(1):
        pass
    with repertoire.hold_generation() as one, repertoire.hold_generation() as two:
        assert one == two == 3
    with pytest.raises(NotARepertoireError, match="no HEAD"), Repertoire(repertoire.root / "no").hold_generation():
        pass


class Overtaken(Repertoire):
    """Once, after it has read HEAD, others publish and collect before it does anything else."""

    overtaken = False

    def head(self) -> int | None:
        number = super().head()
        if not self.overtaken:
            self.overtaken = True
            other = Repertoire(self.root)
            other.rollback(expected=3, to=1)
            collect(other, keep=1)
        return number


def test_a_reader_whose_generation_goes_before_it_holds_it_gets_the_new_one(three_tasks: Workshop) -> None:
    with Overtaken(three_tasks.repertoire.root).hold_generation() as number:
        assert number == 4


def test_a_reader_that_waited_for_a_collector_is_told_that_the_generation_went(three_tasks: Workshop) -> None:
    path = three_tasks.repertoire.manifest_path(1)

    def collector(gate: Gate) -> int:
        with sole_lease(path) as alone:
            gate.reached()
            path.unlink()
            return 0 if alone else 1

    def hold() -> bool:
        with shared_lease(path) as here:
            return here

    def is_open() -> bool:
        return any(link.readlink() == path for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    with child(collector) as process, ThreadPoolExecutor(1) as threads:
        process.wait_reached()
        waiting = threads.submit(hold)
        while not is_open():
            assert not waiting.done()
        process.go_on()
        assert waiting.result(timeout=60) is False
        assert process.end() == 0


def test_beside_a_writer_that_collects_all_the_time_a_reader_always_gets_a_whole_generation(
    three_tasks: Workshop,
) -> None:
    root = three_tasks.repertoire.root
    num_rounds = 40

    def writer(gate: Gate) -> int:
        repertoire = Repertoire(root)
        gate.reached()
        for current in range(3, 3 + num_rounds):
            repertoire.rollback(expected=current, to=current - 1)
            collect(repertoire, keep=2)
        return 0

    repertoire, seen = Repertoire(root), set()
    with child(writer) as process:
        process.wait_reached()
        process.go_on()
        while len(seen) == 0 or max(seen) < 3 + num_rounds:
            with repertoire.hold_generation() as number:
                seen.add(number)
                assert read_all(repertoire, number) > 0
        assert process.end() == 0
    assert len(seen) > 1


def test_a_blob_deleted_under_a_reader_fails_its_task_and_no_other(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    with repertoire.hold_generation() as number:
        generation = open_generation(repertoire, number)
        red, green, _ = generation.manifest.experts
        repertoire.blob_path(green.digest).unlink()
        with pytest.raises(BlobMissingError, match="of task green"):
            repertoire.read_unit(green, green.units[0], generation.manifest.base)
        assert repertoire.read_unit(red, red.units[0], generation.manifest.base).layer == red.units[0].layer


# ---- two writers, full disks


def test_of_two_processes_that_publish_at_once_one_wins_and_the_other_is_told(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root

    def writer(to: int) -> Callable[[Gate], int]:
        def work(gate: Gate) -> int:
            repertoire = Repertoire(root)
            expected = repertoire.manifest().generation
            gate.reached()
            try:
                repertoire.rollback(expected=expected, to=to)
            except GenerationMismatchError:
                return 7
            return 0

        return work

    with child(writer(1)) as one, child(writer(2)) as two:
        for process in (one, two):
            process.wait_reached()
        for process in (one, two):
            process.go_on()
        assert sorted((one.end(), two.end())) == [0, 7]
    assert three_tasks.repertoire.generations() == (1, 2, 3, 4)
    assert audit(three_tasks.repertoire, [4]).faults == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_previous_generation(three_tasks: Workshop, small_disk: Path) -> None:
    root = small_disk / "repertoire"
    repertoire, first, second = Repertoire(root), three_tasks.repertoire.manifest(1), three_tasks.repertoire.manifest(2)
    (small_disk / "ballast").write_bytes(bytes(1))
    with pytest.raises(OSError, match="No space left") as caught:
        repertoire.publish(first, three_tasks.blobs, expected=None)
    assert caught.value.errno == NO_SPACE
    assert repertoire.head() is None
    assert not [name for name in files_of(root) if ".partial" in name]
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    repertoire.publish(first, three_tasks.blobs, expected=None)
    (small_disk / "ballast").write_bytes(bytes(free_bytes(small_disk)))
    with pytest.raises(OSError, match="No space left"):
        repertoire.publish(second, three_tasks.blobs, expected=1)
    assert repertoire.head() == 1
    assert audit(repertoire, [1]).faults == ()
    (small_disk / "ballast").unlink()
    repertoire.publish(second, three_tasks.blobs, expected=1)
    assert audit(repertoire, [1, 2]).faults == ()


def free_bytes(folder: Path) -> int:
    numbers = os.statvfs(folder)
    return numbers.f_bavail * numbers.f_frsize


@pytest.mark.parametrize("limit", [0, 100, 2000, 30_000])
def test_a_file_that_may_not_grow_leaves_the_previous_generation(
    three_tasks: Workshop, tmp_path: Path, limit: int
) -> None:
    root = tmp_path / "limited"
    manifests = [three_tasks.repertoire.manifest(number) for number in (1, 2)]
    Repertoire(root).publish(manifests[0], three_tasks.blobs, expected=None)

    def work(_gate: Gate) -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            Repertoire(root).publish(manifests[1], three_tasks.blobs, expected=1)
        except OSError:
            return 7
        return 0

    with child(work) as process:
        assert process.end() == 7
    repertoire = Repertoire(root)
    assert repertoire.head() == 1
    assert not [name for name in files_of(root) if ".partial" in name]
    assert audit(repertoire, [1]).faults == ()
    repertoire.publish(manifests[1], three_tasks.blobs, expected=1)
    assert audit(repertoire, [2]).faults == ()


# ---- audit


def test_an_audit_of_a_whole_repertoire_reads_every_blob_once_and_finds_nothing(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    seen: list[tuple[int, int]] = []
    found = audit(repertoire, repertoire.generations(), on_progress=lambda done, total: seen.append((done, total)))
    stored = sum(path.stat().st_size for path in (repertoire.root / "blobs").rglob("*") if path.is_file())
    assert found.faults == ()
    assert (found.num_blobs, found.num_bytes) == (len(repertoire.manifest().blob_digests()), stored)
    assert seen[-1] == (stored, stored)
    assert seen == sorted(seen)


def test_an_audit_reports_every_fault_with_all_generations_that_have_it(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    manifest = repertoire.manifest()
    red, green, blue = manifest.experts
    data = bytearray(repertoire.blob_path(red.digest).read_bytes())
    for unit in red.units:
        data[unit.offset] ^= 1
    repertoire.blob_path(red.digest).write_bytes(data)
    path = repertoire.blob_path(green.digest)
    path.write_bytes(path.read_bytes()[:-1])
    repertoire.blob_path(manifest.task("blue").router.digest).unlink()
    repertoire.blob_path(manifest.task("blue").locator.digest).write_bytes(b"")
    found = audit(repertoire, [1, 2, 3])
    assert [(fault.generations, fault.where, type(fault.error)) for fault in found.faults] == [
        ((1, 2, 3), "red: experts", DigestMismatchError),
        ((1, 2, 3), "red: experts", DigestMismatchError),
        ((1, 2, 3), "red: experts", DigestMismatchError),
        ((2, 3), "green: experts", DigestMismatchError),
        ((2, 3), "green: experts", BlobTruncatedError),
        ((3,), "blue: router", BlobMissingError),
        ((3,), "blue: density", DigestMismatchError),
    ]
    assert "layer 3" in str(found.faults[2].error)
    assert audit(repertoire, [3]).num_blobs == len(manifest.blob_digests())
    assert blue.digest in manifest.blob_digests()


def test_an_audit_compares_the_metadata_with_the_manifest(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    path = repertoire.manifest_path(3)
    path.write_text(path.read_text().replace('"scale": 2.0', '"scale": 4.0', 1))
    (fault,) = audit(repertoire, [3]).faults
    assert fault.where == "red: experts"
    assert "'scale': 2.0" in str(fault.error)


def test_an_audit_goes_on_behind_a_manifest_that_cannot_be_read(three_tasks: Workshop) -> None:
    three_tasks.repertoire.manifest_path(2).write_text("no manifest")
    (fault,) = audit(three_tasks.repertoire, [1, 2, 3]).faults
    assert (fault.generations, fault.where, type(fault.error)) == ((2,), "manifest", ManifestError)


def test_every_blob_that_a_manifest_names_is_audited_as_what_it_is(three_tasks: Workshop) -> None:
    digests = three_tasks.repertoire.manifest().blob_digests()
    for digest in digests:
        three_tasks.repertoire.blob_path(digest).unlink()
    faults = audit(three_tasks.repertoire, [3]).faults
    assert {digest for digest in digests for fault in faults if digest in str(fault.error)} == digests
    assert "blob" not in {fault.where for fault in faults}


# ---- inventory and difference


def test_the_list_has_a_row_per_generation_even_for_one_that_cannot_be_read(three_tasks: Workshop) -> None:
    three_tasks.repertoire.manifest_path(1).write_text("no manifest")
    first, second, third = list_generations(three_tasks.repertoire)
    assert first.fault is not None
    assert (second.parent, second.num_tasks, second.is_current) == (1, 2, False)
    assert (third.parent, third.num_tasks, third.is_current, third.num_experts) == (2, 3, True, 6)
    stored = sum(path.stat().st_size for path in (three_tasks.repertoire.root / "blobs").rglob("*") if path.is_file())
    assert third.num_bytes == stored
    with pytest.raises(NotARepertoireError):
        list_generations(Repertoire(three_tasks.repertoire.root / "none"))


def test_a_task_row_counts_what_the_task_brought(three_tasks: Workshop) -> None:
    rows = list_tasks(three_tasks.repertoire)
    assert [(row.task, row.layers, row.ranks, row.num_visible) for row in rows] == [
        ("red", (2, 3), (4,), 1),
        ("green", (2, 3), (2,), 2),
        ("blue", (2, 3), (8,), 3),
    ]
    D, H, L = 64, 128, 2  # width, FFN width, layers with experts
    assert [row.expert_parameters for row in rows] == [L * 3 * R * (D + H) for R in (4, 2, 8)]


def test_a_difference_names_what_was_added_removed_and_changed(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    grown = compare(repertoire, 1, 3)
    assert (grown.tasks.added, grown.tasks.removed, grown.tasks.changed) == (("green", "blue"), (), ())
    assert grown.expert_sets.added == tuple(entry.digest for entry in repertoire.manifest().experts[1:])
    one, three = (repertoire.manifest(number).blob_digests() for number in (1, 3))
    assert (grown.only_first.num_blobs, grown.only_second.num_blobs) == (0, len(three - one))
    assert grown.shared.num_blobs == len(one)
    back = compare(repertoire, 3, 1)
    assert (back.tasks.removed, back.only_first) == (grown.tasks.added, grown.only_second)
    manifest = repertoire.manifest()
    red = manifest.tasks[0]
    other = red.model_copy(update={"router": red.router.model_copy(update={"digest": manifest.tasks[1].router.digest})})
    changed = manifest.model_copy(
        update={"generation": 4, "parent": 3, "tasks": (other, *manifest.tasks[1:]), "prompt_template": "? {input}"}
    )
    repertoire.publish(changed, {}, expected=3)
    difference = compare(repertoire, 3, 4)
    assert (difference.tasks.changed, difference.routers.changed, difference.routers.added) == (("red",), ("red",), ())
    assert difference.settings == ("prompt_template",)
