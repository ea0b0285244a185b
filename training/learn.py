"""Learn a task's experts and routers: probe where the policy asks, start the new experts, train, report.

It does not know repertoires or locators.
Read first: the first task gets an expert in every layer, whatever the policy (paper); so does a task before which
nothing is visible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from training.batches import Row
from training.config import TrainingConfig
from training.expansion import LayerUse, expansion_policy
from training.loop import Surroundings
from training.mixtures import copied_expert, cosine, fresh_experts
from training.probe import Probing, probe
from training.report import LayerReport, TaskReport
from training.task import TrainedTask, check_trainable, train_task


@dataclass(frozen=True)
class OlderSet:
    """An expert set that the new task may see: its digest, and layer -> expert."""

    digest: str
    experts: Mapping[int, Expert]


@dataclass(frozen=True)
class Learned:
    """A trained task and what is to be told of it; the report's `generation` is the caller's to set."""

    trained: TrainedTask
    report: TaskReport


def learn(
    base: BaseModel,
    rows: Sequence[Row],
    older: Sequence[OlderSet],
    *,
    name: str,
    first_layer: int,
    generation: int,
    config: TrainingConfig,
    around: Surroundings | None = None,
    on_phase: Callable[[str], None] = lambda _phase: None,
) -> Learned:
    """Train one task on top of `older`.

    Args:
        base: frozen; as before afterwards.
        rows: all examples of the task.
        older: visible sets, in the order of their arrival.
        name: of the task.
        first_layer: lowest layer that may get an expert.
        generation: for the report.
        config: everything else.
        around: of the training itself; probing keeps no journal, and begins anew after a kill.
        on_phase: called with "probing" and "training" as these begin.

    Raises:
        InvalidInputError, TensorMismatchError, NonFiniteError: as for `train_task`; or too few rows to probe.
    """
    check_trainable(base, rows, name=name, first_layer=first_layer)
    policy = expansion_policy(config)
    layers = range(first_layer, base.info.num_layers)
    sets = [entry.experts for entry in older]
    probing: Probing | None = None
    chosen = frozenset(layers)
    if policy.probes and any(sets):
        on_phase("probing")
        probing = probe(base, rows, sets, name=name, first_layer=first_layer, config=config, masks=policy.masks)
        chosen = policy.expand(probing.layers)
    starts, sources = _starts(base, sets, chosen, probing, name=name, config=config)
    on_phase("training")
    trained = train_task(base, rows, sets, name=name, first_layer=first_layer, config=config, new=starts, around=around)
    added = sum(expert.num_parameters for expert in trained.experts.values())
    added += sum(router.numel() for router in trained.routers.values())
    report = TaskReport(
        task=name,
        generation=generation,
        policy=config.expansion,
        settings=dict(vars(policy)),
        layers=tuple(
            _layer_report(layer, older, trained, sources, probing.layers.get(layer) if probing else None)
            for layer in layers
        ),
        probe_rows=(probing.num_train, probing.num_measure) if probing else None,
        probe_loss=probing.held_out_loss if probing else None,
        num_steps=len(trained.losses),
        final_loss=_final(trained.losses),
        parameters_added=added,
        parameters_everywhere=_everywhere(base, sets, layers, config),
    )
    return Learned(trained, report)


def _starts(
    base: BaseModel,
    sets: Sequence[Mapping[int, Expert]],
    chosen: frozenset[int],
    probing: Probing | None,
    *,
    name: str,
    config: TrainingConfig,
) -> tuple[dict[int, Expert], dict[int, int]]:
    """Where the new experts begin, and layer -> index of the set that was copied.

    A copy keeps the rank of its source; all experts of the set get the configured scale.
    """
    starts, sources = fresh_experts(base, sorted(chosen), config, seed_name=name), {}
    if probing is not None and config.expert_start == "copy":
        for layer in starts:
            source = probing.layers[layer].most_used if layer in probing.layers else None
            if source is not None:
                starts[layer] = copied_expert(sets[source][layer], scale=config.alpha / config.rank)
                sources[layer] = source
    return starts, sources


def _layer_report(
    layer: int, older: Sequence[OlderSet], trained: TrainedTask, sources: Mapping[int, int], use: LayerUse | None
) -> LayerReport:
    source = older[sources[layer]] if layer in sources else None
    return LayerReport(
        layer=layer,
        expanded=layer in trained.experts,
        frequency=use.probe_frequency if use else None,
        frequencies={older[i].digest: use.frequencies[e] for e, i in enumerate(use.members)} if use else {},
        rise=use.rise if use else None,
        copied_from=source.digest if source else None,
        cosine=cosine(trained.experts[layer], source.experts[layer]) if source else None,
    )


def _everywhere(base: BaseModel, sets: Sequence[Mapping[int, Expert]], layers: range, config: TrainingConfig) -> int:
    fresh = fresh_experts(base, layers, config, seed_name="size")
    num_visible = sum(1 + sum(layer in experts for experts in sets) for layer in layers)
    return sum(expert.num_parameters for expert in fresh.values()) + num_visible * base.info.width


def _final(losses: Sequence[float]) -> float | None:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None
