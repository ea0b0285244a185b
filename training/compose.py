"""Compose: a task whose grouped router mixes the experts of other tasks; nothing but the router is trained.

It does not know the training loop (`training.grouped`) or the command line.
Read first: the experts come from tasks that are there already, trained or imported; the new task brings none. Its
router keeps the groups that it was trained with, whatever the repertoire's groups become later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from runtime.model.manifest import Manifest
from runtime.model.names import check_name
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Group, Grouping
from runtime.model.signature import Signer
from training.batches import encode_example
from training.config import TrainingConfig
from training.data import TaskData
from training.grouped import GroupedRouting, frozen_mixture, prompt_summaries, train_routings
from training.publish import NewTask, publish_task, stand_on
from training.router_options import RouterOptions
from training.seeds import seed_for
from training.steps import Progress


def compose(
    repertoire: Repertoire,
    base: BaseModel,
    data: TaskData,
    *,
    groups: Mapping[str, Sequence[str]],
    options: RouterOptions,
    config: TrainingConfig,
    signer: Signer | None = None,
    on_phase: Callable[[str], None] = lambda _phase: None,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> Manifest:
    """Train a grouped router on composite instructions and publish it as a task of its own.

    Args:
        repertoire: holds the tasks that are mixed.
        base: the frozen base.
        data: composite instructions; only its training rows are used.
        groups: name -> tasks whose own experts are in the group; empty takes the repertoire's groups.
        options: see `RouterOptions`.
        config: rates, steps, sizes, seed, and the locator's fields.
        signer: signs the new generation; None leaves it unsigned.
        on_phase: called with "training" and "locating" as these begin.
        on_progress: called after every step.

    Returns:
        the manifest of the new generation, with `groups` among its own.

    Raises:
        InvalidInputError: there are no groups, a task is in two, or it has no experts; the name is taken.
        UnknownTaskError: no such task.
        BaseMismatchError: the repertoire was made for another base.
        GenerationMismatchError: somebody else published meanwhile.
        RepertoireError: the repertoire cannot be read.
    """
    ground = stand_on(repertoire, base, data.name, config)
    if ground.current is None:
        raise InvalidInputError("repertoire", str(repertoire.root), "holds no tasks whose experts could be mixed")
    current = ground.current
    chosen = _digests(current, groups)
    general = None if options.general is None else _own(current, "general", options.general)
    group_of = {digest: name for name, digests in chosen.items() for digest in digests if digest != general}
    if not group_of:
        raise InvalidInputError("group", list(groups), "name groups, such as style=formal,plain: there are none yet")
    grouping = Grouping(
        groups=tuple(group_of.values()),
        scope=options.scope,
        within=options.within,
        tau_group=options.tau_group,
        tau_expert=options.tau_expert,
        epsilon=options.epsilon,
        share=options.share,
        general=general,
    )
    rows = [encode_example(base, ground.template, example, max_tokens=config.max_tokens) for example in data.train]
    read = partial(_read, repertoire, current)
    ffns = frozen_mixture(
        base,
        {digest: read(digest) for digest in group_of},
        group_of,
        read(general) if general else {},
        lambda labels, has_general, generator: GroupedRouting(
            grouping, labels, base.info.width, has_general=has_general, generator=generator
        ),
        seed=seed_for(config.seed, data.name),
    )
    on_phase("training")
    prompts = [row.asked for row in rows]
    summaries = prompt_summaries(base, prompts, ground.first_layer) if options.scope == "request" else None
    train_routings(base, ffns, rows, name=data.name, summaries=summaries, config=config, on_progress=on_progress)
    on_phase("locating")
    tensors = {
        name: tensor
        for layer, ffn in ffns.items()
        if isinstance(ffn.weigh, GroupedRouting)
        for name, tensor in ffn.weigh.tensors(layer).items()
    }
    task = NewTask(
        name=data.name,
        prompts=prompts,
        experts=None,
        router=tensors,
        kind="grouped",
        top_k=len(group_of),
        visible=tuple(group_of),
        grouping=grouping,
        trained_parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
    return publish_task(repertoire, base, ground, task, config, groups=_merged(current.groups, chosen), signer=signer)


def _digests(current: Manifest, groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Group -> digests of its expert sets."""
    if not groups:
        return {group.name: list(group.experts) for group in current.groups}
    found: dict[str, list[str]] = {}
    for name, tasks in groups.items():
        check_name("group", name)
        for task in tasks:
            digest = _own(current, "group", task)
            if any(digest in digests for digests in found.values()):
                raise InvalidInputError("group", f"{name}={task}", "is in a group already")
            found.setdefault(name, []).append(digest)
    return found


def _merged(held: Sequence[Group], chosen: Mapping[str, Sequence[str]]) -> tuple[Group, ...]:
    """The repertoire's groups, where those that were named now come after those of before, and win."""
    named = {digest for digests in chosen.values() for digest in digests}
    merged = {group.name: [digest for digest in group.experts if digest not in named] for group in held}
    for name, digests in chosen.items():
        merged[name] = [*merged.get(name, []), *digests]
    return tuple(Group(name=name, experts=tuple(digests)) for name, digests in merged.items() if digests)


def _own(current: Manifest, field: str, task: str) -> str:
    digest = current.task(task).experts
    if digest is None:
        raise InvalidInputError(field, task, "it has no experts of its own")
    return digest


def _read(repertoire: Repertoire, current: Manifest, digest: str) -> dict[int, Expert]:
    entry = current.expert_set(digest)
    return {unit.layer: repertoire.read_unit(entry, unit, current.base) for unit in entry.units}
