"""The committed stubs are what the committed .proto files generate.

It does not know what the messages mean.
Read first: after a change of a .proto file, `make protos` makes these tests pass again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROTOS = sorted(path.relative_to(ROOT / "protos").as_posix() for path in (ROOT / "protos").rglob("*.proto"))
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


@pytest.mark.parametrize("proto", PROTOS)
def test_generating_the_stubs_again_gives_the_committed_bytes(tmp_path: Path, proto: str) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Igreenroom/pb=protos", *outputs, f"greenroom/pb/{proto}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for ending in GENERATED:
        stub = Path("greenroom/pb", proto.removesuffix(".proto") + ending)
        assert (ROOT / stub).read_bytes() == (tmp_path / stub).read_bytes(), stub


def test_every_proto_file_has_committed_stubs() -> None:
    for proto in (ROOT / "protos").rglob("*.proto"):
        stub = ROOT / "greenroom" / "pb" / proto.relative_to(ROOT / "protos").with_name(f"{proto.stem}_pb2.py")
        assert stub.is_file(), proto
