"""The committed stubs are what the committed .proto files generate.

It does not know what the messages mean.
Read first: after a change of a .proto file, `make protos` makes these tests pass again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROTO = "greenroom/pb/greenroom/v1/greenroom.proto"
GENERATED = ("greenroom_pb2.py", "greenroom_pb2.pyi", "greenroom_pb2_grpc.py")


def test_generating_the_stubs_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Igreenroom/pb=protos", *outputs, PROTO]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    folder = Path(PROTO).parent
    for name in GENERATED:
        assert (ROOT / folder / name).read_bytes() == (tmp_path / folder / name).read_bytes(), name


def test_every_proto_file_has_committed_stubs() -> None:
    for proto in (ROOT / "protos").rglob("*.proto"):
        stub = ROOT / "greenroom" / "pb" / proto.relative_to(ROOT / "protos").with_name(f"{proto.stem}_pb2.py")
        assert stub.is_file(), proto
