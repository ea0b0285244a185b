"""The targets, and what exporting one means: open, build, verify, put in place.

It does not know what a target's files compute; each target is a file of its own and one line in `TARGETS`.
Read first: nothing is visible in the repertoire before everything of a target is verified, and exporting what is there
already, undamaged and of the same generation, does nothing.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import onnx
import onnxruntime
import torch

from exporters.artefact import read_artefact, replaced_folder, sha256_of
from exporters.gguf_lora import write_gguf
from exporters.hyper_inputs import hyper_refusal
from exporters.manifest import FILE_NAME, SCHEMA_VERSION, ExportManifest, FileEntry
from exporters.merged import write_merged
from exporters.onnx_experts import write_experts
from exporters.onnx_features import write_features
from exporters.onnx_graph import Progress
from exporters.onnx_locator import write_locator
from exporters.onnx_model import write_model
from exporters.onnx_router import router_refusal, write_routers
from exporters.options import NO_OPTIONS, Options, Source
from runtime.errors import InvalidInputError, UnsupportedDeviceError
from runtime.model.generation import Generation, open_generation
from runtime.model.mixture import Mixture
from runtime.model.repertoire import Repertoire

Writer = Callable[[Source, Path, Progress], tuple[FileEntry, ...]]


@dataclass(frozen=True)
class Target:
    """One kind of artefact.

    Args:
        write: writes and verifies the files in a folder that nobody sees yet.
        required: names of the `Options` that it cannot do without.
        optional: those that it takes besides.
        refusal: why it cannot take a task's mixture; None where it can. Such a task is left out, or an error if it is
            the one that was asked for.
    """

    write: Writer
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    refusal: Callable[[Mixture], str | None] = lambda _mixture: None


_MIXTURE = frozenset({"task", "weights"})


def _write_adapter(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Target `peft`, imported when it is wanted: that takes seconds."""
    from exporters.peft_adapter import write_adapter

    return write_adapter(source, folder, on_progress)


def _write_kernels(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Target `triton`, imported when it is wanted: the package exists for Linux on x86-64 alone."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedDeviceError("target triton needs the package triton, which exists for Linux on x86-64")
    from exporters.triton_artefact import write_kernels

    return write_kernels(source, folder, on_progress)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "onnx-locator": Target(
            lambda source, folder, progress: write_locator(
                source.generation, folder, progress, opset=source.options.chosen_opset()
            ),
            optional=frozenset({"opset"}),
        ),
        "onnx-router": Target(
            lambda source, folder, progress: write_routers(
                source.generation, folder, progress, opset=source.options.chosen_opset()
            ),
            optional=frozenset({"task", "opset"}),
            refusal=router_refusal,
        ),
        "onnx-experts": Target(write_experts, optional=frozenset({"opset"})),
        "onnx-features": Target(write_features, frozenset({"base"}), frozenset({"prompts", "opset"})),
        "onnx-model": Target(
            write_model, frozenset({"base"}), frozenset({"precision", "opset"}), refusal=hyper_refusal
        ),
        "peft": Target(_write_adapter, frozenset({"base"}), _MIXTURE),
        "merged": Target(write_merged, frozenset({"base"}), _MIXTURE),
        "gguf-lora": Target(write_gguf, optional=_MIXTURE | {"base"}),
        "triton": Target(_write_kernels, optional=frozenset({"arch", "dtype"})),
    }
)
"""By name."""

SIMPLE_TARGETS = ("onnx-locator", "onnx-router", "onnx-experts")
"""Those that are about all tasks and need no option: what is exported where nobody names a target."""


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
    options: Options = NO_OPTIONS,
    on_progress: Progress = lambda _text: None,
) -> Exported:
    """Export one target of a generation, the current one by default.

    Args:
        repertoire: where to read and write.
        target: a key of `TARGETS`.
        generation: its number.
        options: what the target needs or takes besides.
        on_progress: called with what is being done, for people.

    Raises:
        InvalidInputError: unknown target, an option is missing, wrong or not of this target, or nothing to export.
        UnknownTaskError: no such task.
        BaseMismatchError: the generation was made for another base.
        RepertoireError: the generation, or one of its tasks, cannot be read; a part of the tasks is never exported.
        ExportMismatchError: a file does not compute what torch computes; nothing was put in place.
    """
    check_target(target)
    chosen = TARGETS[target]
    options.check(target, required=chosen.required, optional=chosen.optional)
    start = time.monotonic()
    source = repertoire.manifest(generation)
    source_sha256 = sha256_of(repertoire.manifest_path(source.generation))
    folder = repertoire.export_folder(source.generation, options.folder_name(target))
    present, facts = read_artefact(folder), options.facts()
    if present is not None and (present.target, present.source_sha256, present.options) == (
        target,
        source_sha256,
        facts,
    ):
        return Exported(folder, present, was_there=True, seconds=time.monotonic() - start)
    on_progress(f"opening generation {source.generation}")
    opened = open_generation(repertoire, source.generation)
    for task, fault in opened.faults.items():
        raise type(fault)(f"task {task}: {fault}") from fault
    taken, skipped = _taken(opened, target, options.task)
    with replaced_folder(folder) as partial:
        manifest = ExportManifest(
            schema_version=SCHEMA_VERSION,
            target=target,
            generation=source.generation,
            options=facts,
            source_sha256=source_sha256,
            base_digest=source.base.digest,
            versions={
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "torch": torch.__version__,
            },
            files=chosen.write(Source(repertoire=repertoire, generation=taken, options=options), partial, on_progress),
            skipped=skipped,
        )
        (partial / FILE_NAME).write_bytes(manifest.to_json())
    return Exported(folder, manifest, was_there=False, seconds=time.monotonic() - start)


def _taken(opened: Generation, target: str, asked: str | None) -> tuple[Generation, dict[str, str]]:
    """The generation with those mixtures that a target takes, and why it does not take the others.

    Where a task was asked for, it is the only one.

    Raises:
        UnknownTaskError: `asked` is no task.
        InvalidInputError: it is one that the target cannot take.
    """
    refusal, mixtures = TARGETS[target].refusal, opened.mixtures
    if asked is not None:
        mixtures = {asked: opened.mixture(asked)}
    skipped = {name: reason for name, mixture in mixtures.items() if (reason := refusal(mixture)) is not None}
    if asked in skipped:
        raise InvalidInputError("task", asked, f"target {target} cannot take it: {skipped[asked]}")
    kept = {name: mixture for name, mixture in mixtures.items() if name not in skipped}
    return replace(opened, mixtures=kept), skipped
