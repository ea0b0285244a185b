"""What works on this machine: one check per thing that a part of this project needs.

It knows nothing of how checks are shown.
Read first: "fail" is what serving cannot do without, or what was asked for; "note" is what only some parts use.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import GreenroomError, UnsupportedDeviceError
from runtime.model.manifest import Manifest

State = Literal["ok", "note", "fail"]
NEEDED_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, and what was found."""

    name: str
    state: State
    text: str


def check_machine(cache: Path) -> Iterator[Check]:
    """Everything that does not depend on a repertoire.

    Args:
        cache: where the native step is built and bases are kept.
    """
    found = sys.version_info[:3]
    yield Check("python", "ok" if found[:2] == NEEDED_PYTHON else "fail", ".".join(map(str, found)))
    yield _memory()
    yield from _torch()
    yield _native_step(cache / "native")
    yield _onnxruntime()
    yield _installed("triton", "GPU kernels are compiled with it; running them does not need it")
    yield _installed("opentelemetry.sdk", "only for traces: pip install greenroom[otel]")
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    yield Check("cache", "ok", f"{cache}, {free >> 20} MiB free")


def check_port(host: str, port: int) -> Check:
    """Whether a port can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check("port", "fail", f"{host}:{port} cannot be bound: {error.strerror}")
    return Check("port", "ok", f"{host}:{port} is free")


def check_repertoire(
    repertoire: Path | None, base: str | None, cache: Path
) -> tuple[list[Check], Manifest | None, Path | None]:
    """A repertoire's current generation and the base it needs; the manifest and the base's folder where they are fine.

    Args:
        repertoire: its folder; None for none.
        base: name or folder; None takes what the repertoire names.
        cache: folder of known bases.
    """
    from runtime.model.base import describe_base, resolve_base
    from runtime.model.generation import check_base
    from runtime.model.repertoire import Repertoire

    checks: list[Check] = []
    manifest, folder = None, None
    if repertoire is not None:
        try:
            manifest = Repertoire(repertoire).manifest()
            text = f"generation {manifest.generation}, {len(manifest.tasks)} tasks, base {manifest.base.name}"
            checks.append(Check("repertoire", "ok", text))
        except GreenroomError as error:
            checks.append(Check("repertoire", "fail", str(error)))
    name = base or (manifest.base.name if manifest is not None else None)
    if name is not None:
        try:
            folder = resolve_base(name, cache=cache)
            info = describe_base(folder)
            if manifest is not None:
                check_base(manifest, info)
            checks.append(Check("base", "ok", f"{info.architecture}, {info.num_layers} layers of {info.width}"))
        except GreenroomError as error:
            folder = None
            checks.append(Check("base", "fail", str(error)))
    return checks, manifest, folder


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("machine", "ok", f"{platform.machine()}, {os.cpu_count()} cores, {total >> 20} MiB memory")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        yield Check("gpu", "ok", names)
    else:
        yield Check("gpu", "note", "none that torch can use; everything runs on the CPU")


def _native_step(folder: Path) -> Check:
    from runtime.kernels.native_build import build

    try:
        return Check("native step", "ok", f"built: {build(folder).name}")
    except UnsupportedDeviceError as error:
        return Check("native step", "note", f"torch computes instead: {error}")


def _onnxruntime() -> Check:
    import onnxruntime

    return Check("onnxruntime", "ok", f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}")


def _installed(module: str, why: str) -> Check:
    from importlib.util import find_spec

    name = module.partition(".")[0]
    if find_spec(name) is None:
        return Check(name, "note", f"not installed; {why}")
    return Check(name, "ok", "installed")
