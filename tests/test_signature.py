"""Signed manifests: what a reader that trusts certain keys takes and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.follower import HeadFollower
from runtime.errors import InvalidInputError, RepertoireError, SignatureError
from runtime.model.audit import audit
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire
from runtime.model.signature import Signer, TrustPolicy, key_id
from runtime.model.store import LocalStore
from runtime.model.transfer import pull, push
from runtime.service.status import rule_for

ROOT = Path(__file__).parents[1]
PEM = serialization.Encoding.PEM


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new pair of keys as files: private, public."""
    key = Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    folder.mkdir(exist_ok=True)
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys", "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "other-keys", "theirs")


def reader(workshop: Workshop, public: Path, *, require: bool = True) -> Repertoire:
    return Repertoire(workshop.repertoire.root, trust=TrustPolicy.load(public, require=require))


def test_a_signed_generation_is_opened_and_an_unsigned_one_refused(
    three_tasks: Workshop, ours: tuple[Path, Path]
) -> None:
    private, public = ours
    repertoire = reader(three_tasks, public)
    with pytest.raises(SignatureError, match=r"000003\.json: not signed"):
        open_generation(repertoire)
    three_tasks.repertoire.sign(3, Signer.load(private))
    assert open_generation(repertoire).faults == {}
    with pytest.raises(SignatureError, match=r"000002\.json"):
        open_generation(repertoire, 2)


def test_a_server_that_follows_takes_a_generation_once_it_is_signed(
    workshop: Workshop, make_engine: Callable[..., Engine], ours: tuple[Path, Path]
) -> None:
    private, public = ours
    workshop.publish("red", "aaaa")
    engine = make_engine(workshop)
    workshop.publish("green", "1234")
    following = HeadFollower(reader(workshop, public), engine, interval_s=60)
    with pytest.raises(SignatureError, match="not signed"):
        following.look()
    assert following.look() is None, "said once"
    workshop.repertoire.sign(2, Signer.load(private))
    assert following.look() == 2
    assert engine.statistics().tasks == ("red", "green")


def test_a_signature_file_is_what_the_format_says(three_tasks: Workshop, ours: tuple[Path, Path]) -> None:
    signer = Signer.load(ours[0])
    three_tasks.repertoire.sign(2, signer)
    record = json.loads((three_tasks.repertoire.root / "generations/000002.sig").read_text())
    assert record.keys() == {"key_id", "algorithm", "signature"}
    assert (record["key_id"], record["algorithm"]) == (signer.key_id, "ed25519")
    (trusted,) = TrustPolicy.load(ours[1]).keys.values()
    assert key_id(trusted) == signer.key_id


@pytest.mark.parametrize("require", [True, False])
def test_a_signature_that_is_there_must_be_right_and_by_a_trusted_key(
    three_tasks: Workshop, ours: tuple[Path, Path], theirs: tuple[Path, Path], *, require: bool
) -> None:
    repertoire = reader(three_tasks, ours[1], require=require)
    three_tasks.repertoire.sign(3, Signer.load(theirs[0]))
    with pytest.raises(SignatureError, match="not trusted"):
        repertoire.manifest()
    three_tasks.repertoire.sign(3, Signer.load(ours[0]))
    assert repertoire.manifest().generation == 3
    path = three_tasks.repertoire.manifest_path(3)
    path.write_bytes(path.read_bytes().replace(b'"threshold": 1000000000.0', b'"threshold": 1000000001.0', 1))
    with pytest.raises(SignatureError, match="is wrong"):
        repertoire.manifest()


def test_without_a_demand_an_unsigned_manifest_is_taken(three_tasks: Workshop, ours: tuple[Path, Path]) -> None:
    assert reader(three_tasks, ours[1], require=False).manifest().generation == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda _record: b"",
        lambda _record: b"\xff\xfe",
        lambda record: json.dumps({**record, "surprise": 1}).encode(),
        lambda record: json.dumps({**record, "algorithm": "none"}).encode(),
        lambda record: json.dumps({**record, "signature": "%%%"}).encode(),
        lambda record: json.dumps({**record, "signature": ""}).encode(),
        lambda record: json.dumps({**record, "signature": "AAAA" + record["signature"][4:]}).encode(),
    ],
)
def test_a_damaged_signature_is_refused(
    three_tasks: Workshop, ours: tuple[Path, Path], damage: Callable[[dict[str, str]], bytes]
) -> None:
    three_tasks.repertoire.sign(3, Signer.load(ours[0]))
    path = three_tasks.repertoire.root / "generations/000003.sig"
    path.write_bytes(damage(json.loads(path.read_text())))
    with pytest.raises(SignatureError):
        reader(three_tasks, ours[1]).manifest()


def test_a_signature_belongs_to_one_generation(three_tasks: Workshop, ours: tuple[Path, Path]) -> None:
    signer, root = Signer.load(ours[0]), three_tasks.repertoire.root
    three_tasks.repertoire.sign(2, signer)
    for suffix in ("json", "sig"):
        (root / f"generations/000003.{suffix}").write_bytes((root / f"generations/000002.{suffix}").read_bytes())
    with pytest.raises(RepertoireError, match="the file name says 3"):
        reader(three_tasks, ours[1]).manifest()


def test_what_is_published_or_rolled_back_with_a_signer_is_never_current_unsigned(
    three_tasks: Workshop, ours: tuple[Path, Path]
) -> None:
    signer, strict = Signer.load(ours[0]), reader(three_tasks, ours[1])

    def look(step: str) -> None:
        if step == "done head":
            assert strict.manifest().generation == 4

    Repertoire(three_tasks.repertoire.root, on_step=look).rollback(expected=3, to=1, signer=signer)
    assert strict.manifest().task_names() == ("red",)


def test_a_signature_of_a_publish_that_was_killed_is_not_taken_for_that_of_the_next(
    three_tasks: Workshop, ours: tuple[Path, Path]
) -> None:
    (three_tasks.repertoire.root / "generations/000004.sig").write_bytes(b"over something else")
    three_tasks.repertoire.rollback(expected=3, to=1)
    assert reader(three_tasks, ours[1], require=False).manifest().generation == 4


def test_a_folder_of_keys_trusts_each_of_them(
    three_tasks: Workshop, tmp_path: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for _, public in (ours, theirs):
        (both / public.name).write_bytes(public.read_bytes())
    for private, _ in (ours, theirs):
        three_tasks.repertoire.sign(3, Signer.load(private))
        assert reader(three_tasks, both).manifest().generation == 3


def test_a_key_that_is_none_is_a_wrong_input(tmp_path: Path, ours: tuple[Path, Path]) -> None:
    private, public = ours
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "ec.pem"
    ec = generate_private_key(SECP256R1())
    other.write_bytes(ec.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    ec_private = tmp_path / "ec.key"
    ec_private.write_bytes(
        ec.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret"))
    )
    for path in (tmp_path / "none", public, ec_private):
        with pytest.raises(InvalidInputError, match="key="):
            Signer.load(path)
    for path in (tmp_path / "none", private, other, empty):
        with pytest.raises(InvalidInputError, match="trust="):
            TrustPolicy.load(path)


def test_an_audit_checks_signatures_of_every_generation(three_tasks: Workshop, ours: tuple[Path, Path]) -> None:
    signer = Signer.load(ours[0])
    three_tasks.repertoire.sign(1, signer)
    three_tasks.repertoire.sign(3, signer)
    (fault,) = audit(reader(three_tasks, ours[1]), [1, 2, 3]).faults
    assert (fault.generations, type(fault.error)) == ((2,), SignatureError)


def test_signatures_travel_and_a_pull_refuses_what_is_not_signed_before_anything_moves(
    three_tasks: Workshop, tmp_path: Path, ours: tuple[Path, Path]
) -> None:
    private, public = ours
    copy = Repertoire(tmp_path / "copy", trust=TrustPolicy.load(public))
    source = three_tasks.repertoire
    with pytest.raises(SignatureError):
        pull(copy, LocalStore(source))
    assert not (copy.root / "blobs").exists()
    for number in (1, 2, 3):
        source.sign(number, Signer.load(private))
    pull(copy, LocalStore(source))
    assert copy.manifest() == source.manifest()


def test_a_signature_made_after_a_push_follows_with_the_next(
    three_tasks: Workshop, tmp_path: Path, ours: tuple[Path, Path]
) -> None:
    copy = Repertoire(tmp_path / "copy", trust=TrustPolicy.load(ours[1]))
    push(three_tasks.repertoire, LocalStore(copy))
    with pytest.raises(SignatureError):
        copy.manifest()
    three_tasks.repertoire.sign(3, Signer.load(ours[0]))
    push(three_tasks.repertoire, LocalStore(copy))
    assert copy.manifest().generation == 3


def test_a_refused_signature_is_a_failed_precondition_with_its_own_reason() -> None:
    assert rule_for(SignatureError("x")).code is grpc.StatusCode.FAILED_PRECONDITION
    assert SignatureError.reason == "SIGNATURE_INVALID"


def test_without_signatures_the_library_is_not_imported() -> None:
    code = "import sys, runtime.model.repertoire; print(*[m for m in sys.modules if m.split('.')[0] == 'cryptography'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == []
