"""Which step runs a base on this machine: native, torch's operations or the base's modules; and how weights are kept.

It knows nothing of requests.
Read first: "auto" takes the native step wherever it runs, and says in the log why where it does not. A base that
neither it nor our own step knows runs through its own modules.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from runtime.engine.linears import Keep, keep_dense, keep_int4, keep_int8
from runtime.engine.llama import LlamaModel, check_supported
from runtime.engine.mixture_launcher import mixture_launcher
from runtime.engine.native_llama import NativeLlama, check_runs_on
from runtime.engine.step_protocol import StepModel
from runtime.errors import InvalidInputError, UnsupportedDeviceError
from runtime.kernels.freed_memory import give_back, given_back_at_once
from runtime.kernels.native_build import build
from runtime.kernels.step_kinds import StepKind, WeightKind
from runtime.kernels.triton_mixture import Launcher
from runtime.model.llama_source import LlamaSource
from runtime.model.stored_base import StoredBase

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger(__name__)
_KEEP: dict[WeightKind, Keep] = {
    "float32": keep_dense,
    "bfloat16": keep_dense,
    "int8": keep_int8,
    "int4": keep_int4,
}


def load_dtype(weights: WeightKind) -> torch.dtype:
    """What a base is loaded in, to be kept as `weights` later."""
    return torch.float32 if weights == "float32" else torch.bfloat16


def load_step_model(
    base: StoredBase,
    *,
    device: torch.device,
    max_context: int,
    weights: WeightKind,
    step: StepKind,
    folder: Path,
    threads: int,
    kernels: Path,
) -> StepModel:
    """The step of a base, with its weights; a context longer than the base reads is cut to that.

    Where our own steps know the base, its weights are packed as they are read, and no model of `transformers` is made.

    Args:
        base: opened.
        device: where it computes.
        max_context: positions to prepare at most.
        weights: see `make_step_model`, as for the others.
        step: likewise.
        folder: likewise.
        threads: likewise.
        kernels: where kernels for GPUs lie, if they were exported; see `runtime.engine.mixture_launcher`.

    Raises:
        UnknownBaseError: its weights cannot be loaded.
        UnsupportedDeviceError, InvalidInputError: see `make_step_model`.
    """
    model: transformers.PreTrainedModel | LlamaSource | None = base.source(dtype=load_dtype(weights), device=device)
    if model is not None:
        max_context = min(max_context, model.config.max_position_embeddings)
        try:
            check_supported(model.config, max_context)
        except InvalidInputError:
            model = None
    if model is None:
        model = base.load(dtype=load_dtype(weights), device=device).model
        max_context = min(max_context, model.config.max_position_embeddings)
    with given_back_at_once():
        made = make_step_model(
            model,
            max_context=max_context,
            weights=weights,
            step=step,
            folder=folder,
            threads=threads,
            launch=mixture_launcher(device, kernels),
        )
    if isinstance(model, torch.nn.Module):  # its parts know each other
        del model
        gc.collect()
    give_back()
    return made


def make_step_model(
    model: transformers.PreTrainedModel | LlamaSource,
    *,
    max_context: int,
    weights: WeightKind,
    step: StepKind,
    folder: Path,
    threads: int,
    launch: Launcher | None = None,
) -> StepModel:
    """Take over a Hugging Face model, or the weights of one.

    Args:
        model: loaded in `load_dtype(weights)`.
        max_context: positions to prepare.
        weights: how its matrices are kept.
        step: "native" or "torch", which includes the base's own modules; "auto" is native where that runs.
        folder: where built libraries are kept.
        threads: for the native step. Torch is set to one thread beside it.
        launch: adds experts' updates in torch's step; None leaves them to its products.

    Raises:
        UnsupportedDeviceError: "native" was asked for and cannot be had here, or rounded weights on a GPU.
        InvalidInputError: an architecture or option that no step computes, or not with these weights.
    """
    for name, value, choices in (("weights", weights, get_args(WeightKind)), ("step", step, get_args(StepKind))):
        if value not in choices:
            raise InvalidInputError(name, value, f"is one of {', '.join(choices)}")
    try:
        check_supported(model.config, max_context)
    except InvalidInputError as error:
        if step == "native" or not isinstance(model, torch.nn.Module):
            raise
        _log.info("steps run through the base's own modules: %s", error)
        return _module_model(model, max_context=max_context, weights=weights)
    if step != "torch":
        torch_threads = torch.get_num_threads()
        try:
            check_runs_on(model.device)
            library = build(folder)
            torch.set_num_threads(1)  # while weights are packed too: what torch does there is too little to share
            return NativeLlama(model, max_context=max_context, library=library, weights=weights, threads=threads)
        except UnsupportedDeviceError as error:
            torch.set_num_threads(torch_threads)
            if step == "native":
                raise
            _log.info("steps run on torch's operations: %s", error)
    return LlamaModel(model, max_context=max_context, keep=_KEEP[weights], launch=launch)


def _module_model(model: transformers.PreTrainedModel, *, max_context: int, weights: WeightKind) -> StepModel:
    # This imports the models of `transformers`, which takes seconds.
    from runtime.engine.module_model import ModuleModel

    if _KEEP[weights] is not keep_dense:
        plain = ", ".join(kind for kind, keep in _KEEP.items() if keep is keep_dense)
        raise InvalidInputError("weights", weights, f"a {type(model).__name__} runs with {plain}")
    return ModuleModel(model, max_context=max_context)
