"""Push and pull: only what is missing moves, in an order that keeps the target readable, and nothing diverges."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from os import getpid, kill
from pathlib import Path

import fsspec
import pytest
from children import Gate, child
from fsspec.implementations.local import LocalFileSystem
from repertoires import Workshop

from runtime.errors import (
    BlobMissingError,
    DigestMismatchError,
    GenerationMismatchError,
    InvalidInputError,
    ManifestError,
    NotARepertoireError,
    RepertoireError,
)
from runtime.model.audit import audit
from runtime.model.collect import collect
from runtime.model.repertoire import Repertoire
from runtime.model.store import LocalStore, RemoteStore, Store, open_store
from runtime.model.transfer import Transferred, pull, push

Open = Callable[[], Store]


class InterruptedTransferError(Exception):
    """What an interrupted transfer ends with here."""


@pytest.fixture(params=["folder", "file", "memory", "any"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one empty place again and again: a path, two URLs, and a file system of which nothing is known."""
    match request.param:
        case "folder":
            yield lambda: open_store(str(tmp_path / "target"))
        case "file":
            yield lambda: open_store(f"file://{tmp_path}/target")
        case "memory":
            url = f"memory://{uuid.uuid4()}/target"
            yield lambda: open_store(url)
            memory = fsspec.filesystem("memory")
            if memory.exists(url):
                memory.rm(url, recursive=True)
        case _:
            yield lambda: RemoteStore(LocalFileSystem(), str(tmp_path / "target"))


def fetched(store: Store, tmp_path: Path) -> Repertoire:
    """What lies in a store, as a folder of its own."""
    repertoire = Repertoire(tmp_path / f"fetched-{uuid.uuid4()}")
    pull(repertoire, store)
    return repertoire


def is_whole(repertoire: Repertoire) -> bool:
    return audit(repertoire, repertoire.generations()).faults == ()


def without(workshop: Workshop, path: Path, number: int) -> Workshop:
    """A copy of the workshop's repertoire at an older generation."""
    repertoire = Repertoire(path)
    for generation in range(1, number + 1):
        repertoire.publish(
            workshop.repertoire.manifest(generation),
            workshop.blobs,
            expected=generation - 1 if generation > 1 else None,
        )
    return Workshop(workshop.base, repertoire, dict(workshop.blobs))


def test_a_pushed_repertoire_is_the_same_everywhere_and_comes_back(
    three_tasks: Workshop, target: Open, tmp_path: Path
) -> None:
    source = three_tasks.repertoire
    done = push(source, target())
    assert (done.head, done.generations) == (3, (1, 2, 3))
    assert done.num_blobs == len(source.manifest().blob_digests())
    again = fetched(target(), tmp_path)
    assert again.head() == 3
    for number in (1, 2, 3):
        assert again.manifest_path(number).read_bytes() == source.manifest_path(number).read_bytes()
    assert is_whole(again)


def test_only_what_is_missing_moves(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    older = without(three_tasks, tmp_path / "older", 2).repertoire
    push(older, target())
    seen: list[tuple[int, int]] = []
    done = push(three_tasks.repertoire, target(), on_progress=lambda arrived, total: seen.append((arrived, total)))
    new = three_tasks.repertoire.manifest(3).blob_digests() - three_tasks.repertoire.manifest(2).blob_digests()
    num_bytes = sum(three_tasks.repertoire.blob_path(digest).stat().st_size for digest in new)
    assert done == Transferred(head=3, generations=(3,), num_blobs=len(new), num_bytes=num_bytes)
    assert (seen[0], seen[-1]) == ((0, num_bytes), (num_bytes, num_bytes))
    assert push(three_tasks.repertoire, target()) == Transferred(head=3, generations=(), num_blobs=0, num_bytes=0)


def test_an_interrupted_push_leaves_the_old_generation_and_goes_on_later(
    three_tasks: Workshop, target: Open, tmp_path: Path
) -> None:
    push(without(three_tasks, tmp_path / "older", 1).repertoire, target())

    def interrupt(arrived: int, total: int) -> None:
        if arrived > total // 2:
            raise InterruptedTransferError

    with pytest.raises(InterruptedTransferError):
        push(three_tasks.repertoire, target(), on_progress=interrupt)
    assert fetched(target(), tmp_path).head() == 1
    one = three_tasks.repertoire.manifest(1).blob_digests()
    num_missing = len(three_tasks.repertoire.manifest().blob_digests() - one)
    done = push(three_tasks.repertoire, target())
    assert 0 < done.num_blobs < num_missing
    again = fetched(target(), tmp_path)
    assert again.head() == 3
    assert is_whole(again)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_a_push_that_is_killed_leaves_the_old_generation_and_goes_on_later(
    three_tasks: Workshop, tmp_path: Path, share: float
) -> None:
    copy = without(three_tasks, tmp_path / "copy", 1).repertoire

    def work(_gate: Gate) -> int:
        def die(arrived: int, total: int) -> None:
            if arrived >= share * total:
                kill(getpid(), signal.SIGKILL)

        push(three_tasks.repertoire, LocalStore(copy), on_progress=die)
        return 0

    with child(work) as process:
        assert process.end() == -signal.SIGKILL
    assert copy.head() == 1
    assert is_whole(copy)
    done = push(three_tasks.repertoire, LocalStore(copy))
    assert done.head == copy.head() == 3
    assert is_whole(copy)
    assert not list(copy.root.rglob(".partial-*"))


def test_a_blob_that_came_in_part_is_continued(three_tasks: Workshop, tmp_path: Path) -> None:
    copy = Repertoire(tmp_path / "copy")
    digest = three_tasks.repertoire.manifest().experts[0].digest
    data = three_tasks.repertoire.blob_path(digest).read_bytes()
    partial = copy.blob_path(digest).with_name(f".partial-{digest}")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:1000])
    total = sum(
        three_tasks.repertoire.blob_path(d).stat().st_size for d in three_tasks.repertoire.manifest().blob_digests()
    )
    assert pull(copy, LocalStore(three_tasks.repertoire)).num_bytes == total - 1000
    assert copy.blob_path(digest).read_bytes() == data


def test_a_part_that_is_not_the_beginning_of_the_blob_is_thrown_away(three_tasks: Workshop, tmp_path: Path) -> None:
    copy = Repertoire(tmp_path / "copy")
    digest = three_tasks.repertoire.manifest().experts[0].digest
    partial = copy.blob_path(digest).with_name(f".partial-{digest}")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"something else")
    with pytest.raises(DigestMismatchError):
        pull(copy, LocalStore(three_tasks.repertoire))
    assert not partial.exists()
    assert copy.head() is None
    assert pull(copy, LocalStore(three_tasks.repertoire)).head == 3


def test_a_damaged_blob_never_gets_its_name_at_the_target(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    digest = three_tasks.repertoire.manifest().experts[1].digest
    path = three_tasks.repertoire.blob_path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DigestMismatchError, match=digest):
        push(three_tasks.repertoire, target())
    assert digest not in target().blob_sizes()
    with pytest.raises(NotARepertoireError):
        fetched(target(), tmp_path)


class CorruptingFileSystem(LocalFileSystem):
    """Stores other bytes than it was given."""

    cachable = False

    def open(self, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "rb" and ".partial-" in path:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return super().open(path, mode, **options)


def test_what_arrives_otherwise_than_it_was_sent_is_noticed(three_tasks: Workshop, tmp_path: Path) -> None:
    store = RemoteStore(CorruptingFileSystem(), str(tmp_path / "target"))
    with pytest.raises(DigestMismatchError):
        push(three_tasks.repertoire, store)
    assert store.blob_sizes() == {}
    trusting = RemoteStore(CorruptingFileSystem(), str(tmp_path / "target"), read_back=False)
    assert push(three_tasks.repertoire, trusting).head == 3


def test_a_target_with_a_history_of_its_own_is_refused(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    other = without(three_tasks, tmp_path / "other", 1)
    other.publish("violet", "zzzz", rank=3)
    push(other.repertoire, target())
    with pytest.raises(GenerationMismatchError, match="another history: its generation 2 is not that of"):
        push(three_tasks.repertoire, target())
    with pytest.raises(GenerationMismatchError, match="another history"):
        pull(three_tasks.repertoire, target())
    assert fetched(target(), tmp_path).manifest().task_names() == ("red", "violet")


def test_a_target_that_is_ahead_is_refused(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    push(three_tasks.repertoire, target())
    older = without(three_tasks, tmp_path / "older", 2).repertoire
    with pytest.raises(GenerationMismatchError, match=r"is at generation 3, .* only at 2"):
        push(older, target())
    assert pull(older, target()).head == 3


def test_a_target_that_moves_meanwhile_keeps_its_head(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    push(without(three_tasks, tmp_path / "older", 1).repertoire, target())

    def interfere(arrived: int, total: int) -> None:
        if arrived == total:
            target().write("HEAD", b"2\n")

    with pytest.raises(GenerationMismatchError, match="somebody else published meanwhile"):
        push(three_tasks.repertoire, target(), on_progress=interfere)
    assert target().read("HEAD") == b"2\n"


def test_a_local_target_cannot_be_published_to_while_it_is_filled(three_tasks: Workshop, tmp_path: Path) -> None:
    copy = without(three_tasks, tmp_path / "copy", 1).repertoire

    def publisher(gate: Gate) -> int:
        gate.reached()
        try:
            copy.publish(three_tasks.repertoire.manifest(2), three_tasks.blobs, expected=1)
        except GenerationMismatchError:
            return 7
        return 0

    with child(publisher) as process:
        process.wait_reached()
        push(three_tasks.repertoire, LocalStore(copy), on_progress=lambda arrived, _: arrived or process.go_on())
        assert process.end() == 7
    assert copy.head() == 3


def test_histories_can_be_compared_after_the_source_was_collected(
    three_tasks: Workshop, target: Open, tmp_path: Path
) -> None:
    push(without(three_tasks, tmp_path / "older", 2).repertoire, target())
    stranger = without(three_tasks, tmp_path / "stranger", 1)
    stranger.publish("violet", "zzzz", rank=3)
    collect(three_tasks.repertoire, keep=1)
    with pytest.raises(GenerationMismatchError, match="another history"):
        push(three_tasks.repertoire, LocalStore(stranger.repertoire))
    assert push(three_tasks.repertoire, target()).generations == (3,)
    late = fetched(LocalStore(three_tasks.repertoire), tmp_path)
    assert late.generations() == (3,)
    with pytest.raises(NotARepertoireError, match="was collected"):
        late.manifest(1)


def test_a_history_of_which_nothing_is_known_is_refused(three_tasks: Workshop, target: Open, tmp_path: Path) -> None:
    push(without(three_tasks, tmp_path / "older", 1).repertoire, target())
    three_tasks.repertoire.manifest_path(1).unlink()
    with pytest.raises(GenerationMismatchError, match="generation 1 is not there, so histories cannot be compared"):
        push(three_tasks.repertoire, target())
    (three_tasks.repertoire.root / "generations/000001.sha256").write_text("../../etc/passwd")
    with pytest.raises(ManifestError, match="does not hold a SHA-256"):
        push(three_tasks.repertoire, target())


def test_what_is_being_pushed_is_not_collected(three_tasks: Workshop, tmp_path: Path) -> None:
    repertoire = three_tasks.repertoire

    def interfere(arrived: int, total: int) -> None:
        if arrived == 0:
            repertoire.rollback(expected=3, to=1)
            done = collect(repertoire, keep=1)
            assert (done.held, done.removed) == ((1, 2, 3), ())

    assert push(repertoire, open_store(str(tmp_path / "target")), on_progress=interfere).head == 3
    assert is_whole(Repertoire(tmp_path / "target"))


def test_a_blob_that_was_lost_comes_again(three_tasks: Workshop, target: Open) -> None:
    push(three_tasks.repertoire, target())
    digest = three_tasks.repertoire.manifest().experts[0].digest
    path = three_tasks.repertoire.blob_path(digest)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    done = pull(three_tasks.repertoire, target())
    assert (done.num_blobs, done.num_bytes, done.generations) == (1, len(data), ())
    assert path.read_bytes() == data


def test_a_source_that_lacks_a_blob_is_refused_before_anything_moves(three_tasks: Workshop, target: Open) -> None:
    digest = three_tasks.repertoire.manifest().experts[0].digest
    three_tasks.repertoire.blob_path(digest).unlink()
    with pytest.raises(BlobMissingError, match=digest):
        push(three_tasks.repertoire, target())
    assert target().blob_sizes() == {}


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("HEAD", b"../../3\n", ManifestError),
        ("HEAD", b"4\n", NotARepertoireError),
        ("generations/000003.json", b"{}", RepertoireError),
        ("generations/000002.json", None, ManifestError),
    ],
)
def test_a_source_that_says_strange_things_is_refused_before_anything_moves(
    three_tasks: Workshop, tmp_path: Path, name: str, data: bytes | None, error: type[Exception]
) -> None:
    source = three_tasks.repertoire
    if data is None:
        text = source.manifest_path(2).read_text()
        data = text.replace(source.manifest(2).experts[0].digest, "../" * 20 + "etc/passwd").encode()
    (source.root / name).write_bytes(data)
    copy = Repertoire(tmp_path / "copy")
    with pytest.raises(error):
        pull(copy, LocalStore(source))
    assert [path.name for path in copy.root.rglob("*")] in ([], [".writer-lock"])


def test_a_url_without_a_driver_is_a_wrong_input() -> None:
    for url in ("nonsense://x", "s3://x"):
        if url == "s3://x" and "s3fs" in fsspec.available_protocols():
            continue
        with pytest.raises(InvalidInputError, match="url="):
            open_store(url)
