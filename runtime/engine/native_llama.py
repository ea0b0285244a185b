"""A Llama-family model on the native step: a whole range of layers in one call, on a CPU.

It knows nothing of requests; it is `LlamaModel` with another inside.
Read first: mixtures of all kinds run natively, with the experts where they lie in memory. A step with a mixture that
has hyper-adapters runs layer by layer as in `LlamaModel`, on the same packed weights. Torch itself should use one
thread beside this: its threads spin for a while after each operation, on the cores that the step needs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.engine.attention import AttentionPlan
from runtime.engine.explain import RouteWatch
from runtime.engine.kv import KVCache
from runtime.engine.linears import Keep, Linear
from runtime.engine.llama import LlamaModel, MixtureRows, check_supported
from runtime.engine.stage import FetchExpert, Stage
from runtime.engine.staged_router import StagedColumn
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.inspection import address_of
from runtime.kernels.native_mixture import MAX_K, NativeColumn, NativeGroups, NativeMixture, NativePart, NativeStage
from runtime.kernels.native_step import NativeStep, StepShape
from runtime.kernels.step_kinds import WeightKind
from runtime.model.expert import Expert, UnitUpdates
from runtime.model.llama_source import LlamaSource
from runtime.model.mixture import Mixture, Router, RouterPart

if TYPE_CHECKING:
    import transformers

_Unit = tuple[str, int]  # an expert set's digest, and a layer
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_HEAD_ROWS = 2048  # read and packed at once: a whole vocabulary is large beside a layer


class NativeLlama(LlamaModel):
    """As `LlamaModel`; the residual stream is float32.

    Args:
        model: on the CPU; see `LlamaModel`.
        max_context: positions to prepare.
        library: from `runtime.kernels.native_build.build`.
        weights: how matrices are kept; see `NativeStep`.
        threads: that compute.

    `step` is what computes.

    Raises:
        InvalidInputError: an architecture or option that this step does not compute.
        UnsupportedDeviceError: widths that are not multiples of 16, or a model that is not on the CPU.
    """

    recordable = False

    def __init__(
        self,
        model: transformers.PreTrainedModel | LlamaSource,
        *,
        max_context: int,
        library: Path,
        weights: WeightKind,
        threads: int,
    ) -> None:
        config = model.config
        check_supported(config, max_context)
        shape = StepShape(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            ffn=int(config.intermediate_size),
            heads=int(config.num_attention_heads),
            kv_heads=int(config.num_key_value_heads),
            head_width=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
            vocabulary=int(config.vocab_size),
            context=max_context,
            epsilon=float(config.rms_norm_eps),
        )
        check_runs_on(model.device)
        if not shape.native:
            raise UnsupportedDeviceError(
                f"the native step takes widths in multiples of 16 and usual heads, this base has {shape}"
            )
        self.step = NativeStep(library, shape, weights=weights, threads=threads)
        self._cache: KVCache | None = None
        self._mixtures: dict[str, NativeMixture] = {}
        self._columns: dict[_Unit, NativeColumn] = {}
        self._units: dict[str, set[_Unit]] = {}  # of a mixture
        self._wide: torch.Tensor | None = None
        super().__init__(model, max_context=max_context, keep=self._keep, dtype=torch.float32)
        self._wide = None
        self.inspector = self.step.inspector
        self.kv_dtype = torch.float32 if weights == "float32" else torch.bfloat16
        for index, layer in enumerate(self.layers):
            for name in ("attention_norm", "ffn_norm", "qkv_bias", "q_norm", "k_norm"):
                vector = getattr(layer, name)
                if vector is not None:
                    self.step.set(name, index, vector)
        self.step.set("final_norm", 0, self.final_norm)
        self.step.set("cos", 0, self.cos.flatten())
        self.step.set("sin", 0, self.sin.flatten())

    def _keep(self, name: str, layer: int, weight: torch.Tensor) -> Linear:
        self.step.set(name, layer, self._widened(weight))
        return partial(self.step.linear, name, layer)

    def _widened(self, weight: torch.Tensor) -> torch.Tensor:
        """In float32, in the same memory every time: new pages for each matrix would take as long as packing it."""
        if weight.dtype == torch.float32:
            return weight
        if self._wide is None or self._wide.numel() < weight.numel():
            self._wide = torch.empty(weight.numel())
        return self._wide[: weight.numel()].view(weight.shape).copy_(weight)

    def _keep_head(self, source: LlamaSource, keep: Keep) -> Linear:  # noqa: ARG002 - it is packed in pieces
        rows = self.step.shape.vocabulary
        for begin in range(0, rows, _HEAD_ROWS):
            piece = range(begin, min(rows, begin + _HEAD_ROWS))
            self.step.set("head", 0, self._widened(source.head(piece)), place=(begin, rows))
        return partial(self.step.linear, "head", 0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `LlamaModel.logits`."""
        return self.step.logits(hidden.contiguous())

    def forget(self, running: frozenset[str]) -> None:
        """As `LlamaModel.forget`: experts of other mixtures may leave memory."""
        gone = self._mixtures.keys() - running
        for digest in gone:
            del self._mixtures[digest], self._units[digest]
        if gone:
            for unit in self._columns.keys() - set().union(*self._units.values()):
                del self._columns[unit]

    def run_layers(
        self,
        hidden: torch.Tensor,
        layers: range,
        plan: AttentionPlan,
        cache: KVCache,
        mixtures: MixtureRows | None,
    ) -> None:
        """As `LlamaModel.run_layers`."""
        stage = self._stage(mixtures.stage, layers) if mixtures else None
        if mixtures is not None and stage is None:
            super().run_layers(hidden, layers, plan, cache, mixtures)
            return
        if self._cache is not cache:
            self.step.set_cache(cache.keys, cache.values)
            self._cache = cache
        slots, positions = plan.places()
        watch = mixtures.watch if mixtures else None
        record = torch.zeros(len(self.layers), len(slots), 1 + 2 * MAX_K, dtype=torch.int32) if watch else None
        self.step.run_layers(
            hidden,
            layers,
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int32),
            stage=stage,
            rows=mixtures.rows.to(torch.int32) if mixtures else None,
            alone=len(set(slots)) == len(slots),
            record=record,
        )
        if watch is not None and record is not None and mixtures is not None:
            _tell(watch, mixtures.stage, layers, record)

    def _stage(self, stage: Stage, layers: range) -> NativeStage | None:
        """The mixtures of a step, with these layers filled in; None where one of them cannot run natively."""
        if not all(mixture.digest in self._mixtures or _is_native(mixture) for mixture, _ in stage.mixtures):
            return None
        return NativeStage([None, *(self._mixture(mixture, fetch, layers) for mixture, fetch in stage.mixtures)])

    def _mixture(self, mixture: Mixture, fetch: FetchExpert, layers: range) -> NativeMixture:
        native = self._mixtures.get(mixture.digest)
        if native is None:
            native = NativeMixture(len(self.layers))
            self._mixtures[mixture.digest] = native
            self._units[mixture.digest] = set()
        for layer in layers:
            router = mixture.routers.get(layer)
            if router is not None and layer not in native:
                units = [(digest, layer) for digest in router.experts]
                for unit in units:
                    if unit not in self._columns:
                        self._columns[unit] = _column(fetch(*unit))
                self._units[mixture.digest].update(units)
                columns = [self._columns[unit] for unit in units]
                native.set_layer(layer, [_part(part) for part in _parts(mixture, router)], columns)
        return native


def check_runs_on(device: torch.device) -> None:
    """Raise UnsupportedDeviceError for a device that is no CPU."""
    if device.type != "cpu":
        raise UnsupportedDeviceError(f"the native step runs on a CPU, the base is on {device}")


def _is_native(mixture: Mixture) -> bool:
    routers = mixture.routers.values()
    return mixture.hyper is None and all(sum(map(_most, _parts(mixture, router))) <= MAX_K for router in routers)


def _most(part: RouterPart) -> int:
    count = len(part.router.experts)
    return min(part.top_k, count) if part.kind in ("top_k", "arrow") else count


def _parts(mixture: Mixture, router: Router) -> tuple[RouterPart, ...]:
    """A blend's parts, or the one of another mixture."""
    return router.parts or (RouterPart(1.0, mixture.kind, mixture.top_k, router),)


def _part(part: RouterPart) -> NativePart:
    """A part with its temperatures in its weights."""
    assert part.kind != "blend", "a blend is of tasks' own routers"
    router, groups, tau = part.router, None, 1.0
    if router.groups is not None:
        own, tau = router.groups, router.groups.tau_expert
        weight, bias = own.weight / own.tau_group, own.bias / own.tau_group
        groups = NativeGroups(weight, bias, own.allowed, own.member, own.share, own.epsilon)
    return NativePart(
        part.kind,
        part.top_k,
        router.weight.float() if tau == 1 else router.weight.float() / tau,
        None if router.bias is None else router.bias / tau,
        router.constant,
        groups,
        part.share,
    )


def _column(expert: Expert) -> NativeColumn:
    """The expert where it lies; copied only where its B is not kept transposed, or its dtype is a third one."""
    lying = expert.updates
    if isinstance(lying, UnitUpdates) and lying.form.layout == "rows" and lying.form.dtype in _NATIVE_DTYPES:
        begin, size = address_of(lying.data), lying.form.dtype.itemsize
        places = ((target, begin + size * a[2], begin + size * b[2], a[0][0]) for target, a, b in lying.form.places)
        return NativeColumn(places, expert.scale, dtype=lying.form.dtype, kept=lying)
    halves = all(update.a.dtype == torch.bfloat16 for update in expert.updates.values())
    dtype = torch.bfloat16 if halves else torch.float32
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        target: (update.a.to(dtype).contiguous(), update.b.t().to(dtype).contiguous())
        for target, update in expert.updates.items()
    }
    return NativeColumn.of_tensors(updates, expert.scale)


def _tell(watch: RouteWatch, stage: Stage, layers: range, record: torch.Tensor) -> None:
    """Count the weights of the tokens that are asked for; `record` is [L, T, 1 + 2 * MAX_K] as the step filled it."""
    for token, (explanation, row) in watch.tokens.items():
        mixture = stage.mixtures[row - 1][0]
        for layer in layers:
            router = mixture.routers.get(layer)
            if router is None:
                continue
            count = int(record[layer, token, 0])
            places = record[layer, token, 1 : 1 + count].tolist()
            weights = record[layer, token, 1 + MAX_K : 1 + MAX_K + count].view(torch.float32).tolist()
            labels = router.labels or ("",) * len(router.experts)
            columns = [StagedColumn(row, digest, label) for digest, label in zip(router.experts, labels, strict=True)]
            every = [0.0] * len(columns)
            for place, weight in zip(places, weights, strict=True):
                every[place] = weight
            explanation.add(layer, columns, every)
