"""One generation, opened: manifest, locator, and every task's mixture.

It knows nothing of expert weights, which stay on disk until `runtime.memory` reads them.
Read first: a task whose locator entry or router cannot be read is quarantined in `faults` as soon as that is known; the
others are unharmed. A server reads densities when a prompt is first located, and routers when a task is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runtime.errors import BaseMismatchError, RepertoireError
from runtime.model.base import BaseInfo
from runtime.model.densities import Densities
from runtime.model.hyper_sets import stored_shapes
from runtime.model.locator import Locator
from runtime.model.manifest import BaseRef, ExpertSet, Manifest, Task, Unit
from runtime.model.mixture import Mixture
from runtime.model.on_demand import OnDemand
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire
from runtime.model.routers import hyper_sizes, make_mixture, router_bytes, router_shapes


@dataclass(frozen=True)
class Generation:
    """An opened generation; immutable.

    Args:
        manifest: what was published.
        template: how an input becomes a prompt.
        densities: of all tasks, read or not.
        mixtures: task -> mixture, of all tasks without a fault; read when first asked for if opened so.
        read_mixture: reads the mixture of a task from disk; raises RepertoireError where it is bad.
    """

    manifest: Manifest
    template: PromptTemplate
    densities: Densities
    mixtures: Mapping[str, Mixture]
    read_mixture: Callable[[str], Mixture]

    @property
    def locator(self) -> Locator:
        """Decides, over all tasks without a fault; waits until the densities are read."""
        return self.densities.locators()[0]

    @property
    def arrival(self) -> Locator:
        """Guesses from the token embeddings; waits until the densities are read."""
        return self.densities.locators()[1]

    @property
    def faults(self) -> Mapping[str, RepertoireError]:
        """Task -> why it cannot be served, as far as that is known."""
        return self.densities.faults

    def check_task(self, task: str) -> None:
        """Check that a task is there and not quarantined; reads nothing.

        Raises:
            UnknownTaskError: no such task.
            RepertoireError: the task is quarantined.
        """
        self.manifest.task(task)
        if task in self.faults:
            raise self.faults[task]

    def mixture(self, task: str) -> Mixture:
        """Return the mixture of a task.

        Raises:
            UnknownTaskError: no such task.
            RepertoireError: the task is quarantined.
        """
        self.check_task(task)
        return self.mixtures[task]

    def visible_units(self, mixture: Mixture) -> tuple[tuple[ExpertSet, Unit], ...]:
        """Every (layer, expert) that a sequence of this mixture can touch, in the order of `task_units`."""
        used = {(digest, layer) for layer, router in mixture.routers.items() for digest in router.experts}
        units = {(entry.digest, unit.layer): (entry, unit) for t in mixture.tasks for entry, unit in self.task_units(t)}
        return tuple(pair for key, pair in units.items() if key in used)

    def router_bytes(self, task: str) -> int:
        """What a task's routers count for in memory, see `runtime.model.routers.router_bytes`."""
        return router_bytes(self.manifest, self.manifest.task(task))

    def task_units(self, task: str) -> tuple[tuple[ExpertSet, Unit], ...]:
        """Every (layer, expert) that a sequence of this task can touch, in the order in which they should be read.

        By layer; within a layer by how often the task's router chose the expert in training, the most used first.
        """
        entry = self.manifest.task(task)
        layers = zip(self.manifest.visible_layers(entry).items(), entry.router.usage or (), strict=False)
        usage = {
            (digest, layer): share
            for (layer, experts), shares in layers
            for digest, share in zip(experts, shares, strict=True)
        }
        sets = [self.manifest.expert_set(digest) for digest in entry.router.all_experts()]
        pairs = [(expert_set, unit) for expert_set in sets for unit in expert_set.units]

        def order(pair: tuple[ExpertSet, Unit]) -> tuple[int, float, str]:
            digest, layer = pair[0].digest, pair[1].layer
            return layer, -usage.get((digest, layer), 0.0), digest

        return tuple(sorted(pairs, key=order))


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


def open_generation(repertoire: Repertoire, number: int | None = None, *, routers: bool = True) -> Generation:
    """Open a generation, the current one by default.

    Args:
        repertoire: where it lies.
        number: of the generation.
        routers: read all routers and densities now, so that bad ones are among the faults; else a router when its task
            is first asked for, and the densities when a prompt is first located.

    Raises:
        RepertoireError: manifest or frame cannot be read; a fault of one task alone is recorded, not raised.
    """
    manifest = repertoire.manifest(number)

    def read_mixture(name: str) -> Mixture:
        return _open_mixture(repertoire, manifest, manifest.task(name))

    mixtures: dict[str, Mixture] = {}
    faults: dict[str, RepertoireError] = {}
    for name in manifest.task_names() if routers else ():
        try:
            mixtures[name] = read_mixture(name)
        except RepertoireError as error:
            faults[name] = error
    densities = Densities(repertoire, manifest, faults)
    if routers:
        densities.locators()
    return Generation(
        manifest=manifest,
        template=PromptTemplate.parse(manifest.prompt_template),
        densities=densities,
        mixtures={name: mixture for name, mixture in mixtures.items() if name not in faults}
        if routers
        else OnDemand(manifest.task_names(), read_mixture),
        read_mixture=read_mixture,
    )


def _open_mixture(repertoire: Repertoire, manifest: Manifest, task: Task) -> Mixture:
    tensors = repertoire.read_tensors(task.router.digest, router_shapes(manifest, task))
    hyper = None
    if task.hyper is not None:
        shapes = stored_shapes(task.hyper.kind, hyper_sizes(manifest, task, task.hyper))
        hyper = repertoire.read_tensors(task.hyper.digest, shapes)
    return make_mixture(manifest, task, tensors, hyper)
