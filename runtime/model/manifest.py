"""The manifest of one generation: what `generations/000007.json` may say, and nothing else.

It knows nothing of files or tensors: it only checks that a manifest is consistent in itself.
Read first: a manifest is immutable; publishing always writes a new one. `docs/FORMAT.md` is the normative text.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from runtime.errors import ManifestError, UnknownSchemaError, UnknownTaskError
from runtime.model.record import Digest, Name, Record
from runtime.model.router_record import Group, RouterRef

SCHEMA_VERSION = 1

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
ATTENTION_TARGETS: tuple[Target, ...] = ("q", "k", "v", "o")
FFN_TARGETS: tuple[Target, ...] = ("gate", "up", "down")
TARGETS: tuple[Target, ...] = (*ATTENTION_TARGETS, *FFN_TARGETS)


Score = Literal["raw", "z", "abs_z", "neg_elbo"]
Density = Literal["vae", "gaussian", "low_rank"]
Layout = Literal["plain", "rows"]
Feature = Literal["residual_mean", "residual_last", "residual_parts"]


class BaseRef(Record):
    """The base model that every expert of the repertoire was trained on.

    `attention_width` and `kv_width`, the widths of queries and of keys, are needed where experts update attention.
    """

    name: Annotated[str, Field(min_length=1, max_length=256)]
    digest: Digest
    tokenizer_digest: Digest
    architecture: str
    num_layers: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    ffn_width: Annotated[int, Field(ge=1)]
    vocab_size: Annotated[int, Field(ge=1)]
    attention_width: Annotated[int, Field(ge=1)] | None = None
    kv_width: Annotated[int, Field(ge=1)] | None = None


class Unit(Record):
    """One (layer, expert): a contiguous range of the expert set's blob.

    `offset` and `bytes` are in bytes from the start of the blob file; `sha256` is over exactly that range.
    """

    layer: Annotated[int, Field(ge=0)]
    ranks: dict[Target, Annotated[int, Field(ge=1)]]
    offset: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Digest


class ExpertSet(Record):
    """The experts that one task trained, one per layer, in one blob; its digest is the identity of each of them.

    `layout` says how every B lies in the blob: "rows" transposed, as [R, outputs], which kernels read in place; "plain"
    as [outputs, R].
    """

    digest: Digest
    task: Name
    bytes: Annotated[int, Field(ge=1)]
    dtype: Literal["float32", "bfloat16", "float16"]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    units: Annotated[tuple[Unit, ...], Field(min_length=1)]
    layout: Layout = "plain"

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        layers = [unit.layer for unit in self.units]
        if layers != sorted(set(layers)):
            raise ValueError(f"units of expert set {self.digest}: layers must ascend without repetition, got {layers}")
        if any(unit.offset + unit.bytes > self.bytes for unit in self.units):
            raise ValueError(f"units of expert set {self.digest}: a range ends behind the blob's {self.bytes} bytes")
        return self


class LocatorEntry(Record):
    """A task's density model and the calibration of its score on held-out features.

    `mean` and `sd` are those of the raw error; above `threshold` a prompt is not of this task. `prototype` names the
    mean of the task's projected features where the density is a VAE, and null means what the VAE decodes from zero.
    """

    digest: Digest
    mean: float
    sd: Annotated[float, Field(gt=0)]
    threshold: float
    prototype: Digest | None = None


class LocatorRef(Record):
    """What all tasks share: the frame (normalisation and projection of features) and how scores are compared.

    `layer` says where the residual stream is read: what enters that layer; layer 0 is entered by the token embeddings,
    and layer L is what leaves the last one. `residual_last` is its value at the prompt's last token, `residual_mean`
    its mean over the prompt, and `residual_parts` what `runtime.model.locator.parts` makes of it. `beta` weighs the KL
    term of the score "neg_elbo". `background` names the density of prompts in general, whose error every task's is
    taken against; null takes errors as they are. With `unit_length` projected features are brought to one length, each
    part by itself, before they are compared.
    """

    frame: Digest
    feature: Feature
    layer: Annotated[int, Field(ge=0)]
    score: Score
    density: Density = "vae"
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    background: Digest | None = None
    unit_length: bool = False

    @model_validator(mode="after")
    def _fits_the_density(self) -> Self:
        if self.score == "neg_elbo" and self.density != "vae":
            raise ValueError(f"score=neg_elbo: the density must be vae, not {self.density}")
        if self.feature == "residual_parts" and self.density == "vae":
            raise ValueError("feature=residual_parts: the density must be gaussian or low_rank, not vae")
        if self.background is not None and self.density == "vae":
            raise ValueError("background: errors of a vae are not likelihoods, so nothing can be taken from them")
        return self

    def blob_digests(self) -> frozenset[str]:
        """The blobs that all tasks share."""
        return frozenset({self.frame} | ({self.background} if self.background else set()))


class HyperRef(Record):
    """A task's hyper-adapters (HyperMoE): the hypernetwork, or the table of all adapters of a top-1 router.

    The experts that they refer to are those that the task's router may choose, in the order of its rows.
    """

    kind: Literal["network", "table"]
    digest: Digest
    bottleneck: Annotated[int, Field(ge=1)]
    factor: Annotated[int, Field(ge=1)]


class Task(Record):
    """What a user trained: own expert set, router over the visible set, densities for the locator and for arrival."""

    name: Name
    experts: Digest | None
    router: RouterRef
    locator: LocatorEntry
    arrival: LocatorEntry
    trained_parameters: Annotated[int, Field(ge=0)]
    hyper: HyperRef | None = None

    @model_validator(mode="after")
    def _hyper_fits_the_router(self) -> Self:
        if self.hyper and self.router.kind != "top_k":
            raise ValueError(f"task {self.name}: hyper-adapters need a top_k router, not {self.router.kind}")
        if self.hyper and self.hyper.kind == "table" and self.router.top_k > 1:
            raise ValueError(f"task {self.name}: a table of hyper-adapters needs top_k=1, not {self.router.top_k}")
        return self


class Manifest(Record):
    """Everything of one generation.

    `locator` decides; `arrival` guesses from the token embeddings alone, so that reading can begin before it does.
    """

    schema_version: Literal[1]
    generation: Annotated[int, Field(ge=1)]
    parent: Annotated[int, Field(ge=1)] | None
    base: BaseRef
    prompt_template: str
    first_layer: Annotated[int, Field(ge=0)]
    locator: LocatorRef
    arrival: LocatorRef
    experts: tuple[ExpertSet, ...]
    tasks: tuple[Task, ...]
    groups: tuple[Group, ...] = ()

    @model_validator(mode="after")
    def _features_exist(self) -> Self:
        for ref in (self.locator, self.arrival):
            if ref.layer > self.base.num_layers:
                raise ValueError(f"feature at layer {ref.layer}: the base has {self.base.num_layers} layers")
        return self

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        known = {expert_set.digest: expert_set for expert_set in self.experts}
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: a name occurs twice in {names}")
        if not self.first_layer < self.base.num_layers:
            raise ValueError(f"first_layer={self.first_layer}: the base has {self.base.num_layers} layers")
        for expert_set in self.experts:
            lowest, highest = expert_set.units[0].layer, expert_set.units[-1].layer
            if lowest < self.first_layer or highest >= self.base.num_layers:
                raise ValueError(f"expert set {expert_set.digest}: layers {lowest}..{highest} are out of range")
            attends = any(target in ATTENTION_TARGETS for unit in expert_set.units for target in unit.ranks)
            if attends and (self.base.attention_width is None or self.base.kv_width is None):
                raise ValueError(f"expert set {expert_set.digest} updates attention: base.attention_width is missing")
        for task in self.tasks:
            for digest in (*task.router.all_experts(), *((task.experts,) if task.experts else ())):
                if digest not in known:
                    raise ValueError(f"task {task.name}: expert set {digest} is not listed")
            self._check_general(task)
            self._check_usage(task)
        return self

    @model_validator(mode="after")
    def _groups_resolve(self) -> Self:
        known = {expert_set.digest for expert_set in self.experts}
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"groups: a name occurs twice in {names}")
        members = [digest for group in self.groups for digest in group.experts]
        if len(set(members)) != len(members):
            raise ValueError("groups: an expert set is in two groups, or twice in one")
        if not known.issuperset(members):
            raise ValueError(f"groups: expert set {min(set(members) - known)} is not listed")
        return self

    def _check_usage(self, task: Task) -> None:
        if task.router.usage is not None:
            counts = [len(experts) for experts in self.visible_layers(task).values()]
            if counts != [len(shares) for shares in task.router.usage]:
                raise ValueError(f"task {task.name}: usage needs one share per layer and visible expert, {counts}")

    def _check_general(self, task: Task) -> None:
        grouping = task.router.grouping
        if grouping is not None and grouping.general is not None:
            layers = {unit.layer for unit in self.expert_set(grouping.general).units}
            missing = layers - self.visible_layers(task).keys()
            if missing:
                raise ValueError(f"task {task.name}: no visible expert in layer {min(missing)} of the general one")

    def task(self, name: str) -> Task:
        """Return the task of this name.

        Raises:
            UnknownTaskError: there is none.
        """
        try:
            return self._tasks_by_name[name]
        except KeyError:
            raise UnknownTaskError(f"task={name!r}: generation {self.generation} holds {self.task_names()}") from None

    def task_names(self) -> tuple[str, ...]:
        """Names of all tasks in the order of their arrival."""
        return tuple(task.name for task in self.tasks)

    def expert_set(self, digest: str) -> ExpertSet:
        """Return a listed expert set; `_references_resolve` guarantees that every referenced one is listed."""
        return self._sets_by_digest[digest]

    @cached_property
    def _tasks_by_name(self) -> dict[str, Task]:
        return {task.name: task for task in self.tasks}

    @cached_property
    def _sets_by_digest(self) -> dict[str, ExpertSet]:
        return {expert_set.digest: expert_set for expert_set in self.experts}

    def visible_layers(self, task: Task) -> dict[int, tuple[str, ...]]:
        """Return for every layer the digests of the visible experts there, in the order of the router's rows."""
        layers: dict[int, list[str]] = {}
        for digest in task.router.visible:
            for unit in self.expert_set(digest).units:
                layers.setdefault(unit.layer, []).append(digest)
        return {layer: tuple(digests) for layer, digests in sorted(layers.items())}

    def blob_digests(self) -> frozenset[str]:
        """All blobs that this generation needs."""
        digests = {*self.locator.blob_digests(), *self.arrival.blob_digests()}
        digests.update(expert_set.digest for expert_set in self.experts)
        for task in self.tasks:
            digests.add(task.router.digest)
            for entry in (task.locator, task.arrival):
                digests |= {entry.digest} | ({entry.prototype} if entry.prototype else set())
            digests |= {task.hyper.digest} if task.hyper else set()
        return frozenset(digests)

    def to_json(self) -> bytes:
        """Serialise; keys in declaration order, two-space indent, newline at the end."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def parse_manifest(data: bytes, *, source: str, generation: int) -> Manifest:
    """Parse and check a manifest.

    Args:
        data: all of the file.
        source: what to call it in messages.
        generation: the number that its name promises.

    Raises:
        UnknownSchemaError: `schema_version` is not one that this code reads.
        ManifestError: not JSON, or a field is missing, unknown or inconsistent; the message names the field.
    """
    try:
        version = json.loads(data).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise ManifestError(f"{source}: not a JSON object: {error}") from error
    if version != SCHEMA_VERSION:
        raise UnknownSchemaError(f"{source}: schema_version={version!r}, this version reads {SCHEMA_VERSION}")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"{source}: {where}: {first['msg']} (got {str(first['input'])[:80]!r})") from error
    if manifest.generation != generation:
        raise ManifestError(f"{source}: generation={manifest.generation}, the file name says {generation}")
    return manifest
