"""The targets, and what exporting one means: open, build, verify, put in place.

It does not know what a target's files compute; each target is a file of its own and one line in `TARGETS`.
Read first: nothing is visible in the repertoire before everything of a target is verified, and exporting what is there
already, undamaged and of the same generation, does nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx
import onnxruntime
import torch

from exporters.artefact import read_artefact, replaced_folder
from exporters.manifest import FILE_NAME, SCHEMA_VERSION, ExportManifest, FileEntry
from exporters.onnx_graph import Progress
from exporters.onnx_locator import write_locator
from exporters.onnx_router import write_routers
from runtime.errors import InvalidInputError
from runtime.model.generation import Generation, open_generation
from runtime.model.repertoire import Repertoire

Writer = Callable[[Generation, Path, Progress], tuple[FileEntry, ...]]

TARGETS: Mapping[str, Writer] = MappingProxyType({"onnx-locator": write_locator, "onnx-router": write_routers})


@dataclass(frozen=True)
class Exported:
    """What `export` did.

    Args:
        folder: where the artefact lies.
        manifest: what it says of itself.
        was_there: it lay there already and nothing was written.
        seconds: wall time.
    """

    folder: Path
    manifest: ExportManifest
    was_there: bool
    seconds: float


def check_target(target: str) -> None:
    """Check a target's name.

    Raises:
        InvalidInputError: there is no such target.
    """
    if target not in TARGETS:
        raise InvalidInputError("target", target, f"must be one of {', '.join(TARGETS)}")


def export(
    repertoire: Repertoire,
    target: str,
    *,
    generation: int | None = None,
    on_progress: Progress = lambda _text: None,
) -> Exported:
    """Export one target of a generation, the current one by default.

    Args:
        repertoire: where to read and write.
        target: a key of `TARGETS`.
        generation: its number.
        on_progress: called with what is being done, for people.

    Raises:
        InvalidInputError: unknown target, or nothing to export.
        RepertoireError: the generation, or one of its tasks, cannot be read; a part of the tasks is never exported.
        ExportMismatchError: a file does not compute what torch computes; nothing was put in place.
    """
    check_target(target)
    start = time.monotonic()
    source = repertoire.manifest(generation)
    source_sha256 = hashlib.sha256(source.to_json()).hexdigest()
    folder = repertoire.export_folder(source.generation, target)
    present = read_artefact(folder)
    if present is not None and (present.target, present.source_sha256) == (target, source_sha256):
        return Exported(folder, present, was_there=True, seconds=time.monotonic() - start)
    on_progress(f"opening generation {source.generation}")
    opened = open_generation(repertoire, source.generation)
    for task, fault in opened.faults.items():
        raise type(fault)(f"task {task}: {fault}") from fault
    with replaced_folder(folder) as partial:
        manifest = ExportManifest(
            schema_version=SCHEMA_VERSION,
            target=target,
            generation=source.generation,
            source_sha256=source_sha256,
            base_digest=source.base.digest,
            versions={
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "torch": torch.__version__,
            },
            files=TARGETS[target](opened, partial, on_progress),
        )
        (partial / FILE_NAME).write_bytes(manifest.to_json())
    return Exported(folder, manifest, was_there=False, seconds=time.monotonic() - start)
