"""The manifest of one exported artefact: what `exports/<generation>/<target>/manifest.json` says.

It knows nothing of ONNX or torch: names, shapes, digests and what was checked.
Read first: `facts` of a file is what a reader needs beyond its tensors, for example which task a number stands for; an
ONNX file carries the same facts in its own metadata.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from runtime.errors import ManifestError
from runtime.model.record import Digest

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "manifest.json"

Facts = dict[str, JsonValue]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(_Record):
    """An input or output; a letter in `shape` is a dynamic dimension, an empty shape a scalar."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Check(_Record):
    """How one output compared with torch, over all sizes.

    `max_error` is the largest of `|got - wanted| / max(1, scale)`, scale being the size of what torch added up;
    integers must be equal. `rows - rows_compared` rows lay within rounding of the border of a decision and were left
    out.
    """

    output: str
    sizes: tuple[int, ...]
    rows: Annotated[int, Field(ge=1)]
    rows_compared: Annotated[int, Field(ge=1)]
    max_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(ge=0)]


class FileEntry(_Record):
    """One file of the artefact; only a graph has an opset, inputs and outputs."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Digest
    opset: Annotated[int, Field(ge=1)] | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    facts: Facts = {}
    checks: tuple[Check, ...] = ()


class ExportManifest(_Record):
    """Everything of one exported artefact.

    `source_sha256` is that of the generation's manifest as published; `options` are what was chosen beside the target;
    `versions` are those of the libraries that wrote and checked it; `skipped` has the tasks that this target cannot
    take, each with the reason.
    """

    schema_version: Literal[1]
    target: str
    generation: Annotated[int, Field(ge=1)]
    options: Facts = {}
    source_sha256: Digest
    base_digest: Digest
    versions: dict[str, str]
    files: tuple[FileEntry, ...]
    skipped: dict[str, str] = {}

    def max_error(self) -> float:
        """The largest error of all checks; 0 where nothing had to be written."""
        return max((check.max_error for file in self.files for check in file.checks), default=0.0)

    def num_bytes(self) -> int:
        """Bytes of all files but this manifest."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> bytes:
        """Serialise; keys in declaration order, two-space indent, newline at the end."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def parse_export_manifest(data: bytes, *, source: str) -> ExportManifest:
    """Parse and check a manifest.

    Raises:
        ManifestError: not JSON, another schema version, or a field is missing, unknown or wrong.
    """
    try:
        return ExportManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"{source}: {where}: {first['msg']}") from error
