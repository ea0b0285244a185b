"""One generation, opened: manifest, locator, and every task's mixture.

It knows nothing of expert weights, which stay on disk until `runtime.memory` reads them.
Read first: a task whose router or locator entry cannot be read is quarantined in `faults`; the others are unharmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import BaseMismatchError, RepertoireError
from runtime.model.base import BaseInfo
from runtime.model.density import Weights, density_shapes, prototype_shapes
from runtime.model.hyper_sets import stored_shapes
from runtime.model.locator import Locator, frame_shapes
from runtime.model.manifest import BaseRef, ExpertSet, LocatorEntry, LocatorRef, Manifest, Task, Unit
from runtime.model.mixture import Mixture
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire
from runtime.model.routers import hyper_sizes, make_mixture, router_shapes


@dataclass(frozen=True)
class Generation:
    """An opened generation; immutable.

    Args:
        manifest: what was published.
        template: how an input becomes a prompt.
        locator: over all tasks without a fault.
        arrival: the same, for the guess from token embeddings.
        mixtures: task -> mixture, of all tasks without a fault.
        faults: task -> why it cannot be served.
    """

    manifest: Manifest
    template: PromptTemplate
    locator: Locator
    arrival: Locator
    mixtures: Mapping[str, Mixture]
    faults: Mapping[str, RepertoireError]

    def mixture(self, task: str) -> Mixture:
        """Return the mixture of a task.

        Raises:
            UnknownTaskError: no such task.
            RepertoireError: the task is quarantined.
        """
        self.manifest.task(task)
        if task in self.faults:
            raise self.faults[task]
        return self.mixtures[task]

    def visible_units(self, mixture: Mixture) -> tuple[tuple[ExpertSet, Unit], ...]:
        """Every (layer, expert) that a sequence of this mixture can touch, by layer."""
        digests = {digest for router in mixture.routers.values() for digest in router.experts}
        pairs = [
            (entry, unit)
            for entry in self.manifest.experts
            if entry.digest in digests
            for unit in entry.units
            if unit.layer in mixture.routers and entry.digest in mixture.routers[unit.layer].experts
        ]
        return tuple(sorted(pairs, key=lambda pair: (pair[1].layer, pair[0].digest)))


def base_ref(info: BaseInfo) -> BaseRef:
    """The manifest's record of a base model."""
    return BaseRef(
        name=info.name,
        digest=info.digest,
        tokenizer_digest=info.tokenizer_digest,
        architecture=info.architecture,
        num_layers=info.num_layers,
        width=info.width,
        ffn_width=info.ffn_width,
        vocab_size=info.vocab_size,
        attention_width=info.attention_width,
        kv_width=info.kv_width,
    )


def check_base(manifest: Manifest, info: BaseInfo) -> None:
    """Check that a repertoire was made for this base model and tokenizer; the base's name does not matter.

    Raises:
        BaseMismatchError: a digest differs.
    """
    for field in ("digest", "tokenizer_digest"):
        wanted, found = getattr(manifest.base, field), getattr(info, field)
        if wanted != found:
            made_for = f"the repertoire was made for {manifest.base.name}, {wanted[:12]}..."
            raise BaseMismatchError(f"base {info.name}: {field} is {found[:12]}..., {made_for}")


def open_generation(repertoire: Repertoire, number: int | None = None) -> Generation:
    """Open a generation, the current one by default.

    Raises:
        RepertoireError: manifest or frame cannot be read; a fault of one task alone is recorded, not raised.
    """
    manifest = repertoire.manifest(number)
    frames = {
        ref.frame: repertoire.read_tensors(ref.frame, frame_shapes(manifest.base.width))
        for ref in (manifest.locator, manifest.arrival)
    }
    mixtures: dict[str, Mixture] = {}
    densities: list[tuple[Task, Weights, Weights]] = []
    faults: dict[str, RepertoireError] = {}
    for task in manifest.tasks:
        try:
            locator = _read_density(repertoire, manifest.locator, task.locator)
            arrival = _read_density(repertoire, manifest.arrival, task.arrival)
            mixtures[task.name] = _open_mixture(repertoire, manifest, task)
            densities.append((task, locator, arrival))
        except RepertoireError as error:
            faults[task.name] = error
    return Generation(
        manifest=manifest,
        template=PromptTemplate.parse(manifest.prompt_template),
        locator=_locator(
            manifest.locator, frames, [(task.name, tensors, task.locator) for task, tensors, _ in densities]
        ),
        arrival=_locator(
            manifest.arrival, frames, [(task.name, tensors, task.arrival) for task, _, tensors in densities]
        ),
        mixtures=mixtures,
        faults=faults,
    )


def _read_density(repertoire: Repertoire, ref: LocatorRef, entry: LocatorEntry) -> Weights:
    tensors = repertoire.read_tensors(entry.digest, density_shapes(ref.density))
    if entry.prototype is not None:
        tensors |= repertoire.read_tensors(entry.prototype, prototype_shapes())
    return tensors


def _locator(
    ref: LocatorRef, frames: Mapping[str, Weights], entries: list[tuple[str, Weights, LocatorEntry]]
) -> Locator:
    return Locator(frames[ref.frame], entries, score=ref.score, density=ref.density, beta=ref.beta)


def _open_mixture(repertoire: Repertoire, manifest: Manifest, task: Task) -> Mixture:
    tensors = repertoire.read_tensors(task.router.digest, router_shapes(manifest, task))
    hyper = None
    if task.hyper is not None:
        shapes = stored_shapes(task.hyper.kind, hyper_sizes(manifest, task, task.hyper))
        hyper = repertoire.read_tensors(task.hyper.digest, shapes)
    return make_mixture(manifest, task, tensors, hyper)
