"""Router kinds: grouped and Arrow against plain loops, what a request changes, and what a router blob must hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from repertoires import Workshop

from runtime.errors import InvalidInputError, ManifestError, UnknownTaskError
from runtime.kernels.arrow import arrow_prototype
from runtime.kernels.grouping import grouped_weights
from runtime.model.control import controlled, fixed_for, summary
from runtime.model.manifest import parse_manifest
from runtime.model.mixture import Mixture, Router, weigh
from runtime.model.router_record import Grouping, RouterRef
from runtime.model.routers import grouped_router

A, B, C, D, E, GENERAL = (letter * 64 for letter in "abcde0")
NAMES = ("function", "domain", "style")


def grouping(**fields: object) -> Grouping:
    values = {
        "groups": NAMES,
        "scope": "token",
        "within": "input",
        "tau_group": 1.0,
        "tau_expert": 1.0,
        "epsilon": 0.0,
        "share": 1.0,
        "general": None,
    }
    return Grouping(**{**values, **fields})


def grouped_by_loop(
    group_logits: torch.Tensor, logits: torch.Tensor, member: Sequence[int], open_groups: Sequence[bool], epsilon: float
) -> torch.Tensor:
    """The formula of grouped routing, one token, one group and one expert at a time."""
    weights = torch.zeros_like(logits)
    for t in range(logits.shape[0]):
        total = sum(math.exp(group_logits[t, g]) for g, is_open in enumerate(open_groups) if is_open)
        for c, group in enumerate(member):
            if not open_groups[group]:
                continue
            share = math.exp(group_logits[t, group]) / total
            within = sum(math.exp(logits[t, other]) for other, its in enumerate(member) if its == group)
            weights[t, c] = math.exp(logits[t, c]) / within * share * (share >= epsilon)
    return weights


def one_layer(router: Router, **fields: object) -> Mixture:
    values = {"task": "both", "digest": "0" * 64, "top_k": 5, "routers": {3: router}, "kind": "grouped", **fields}
    return Mixture(**values)  # type: ignore[arg-type]


def random_router(ref: Grouping, labels: tuple[str, ...], general: str | None = None) -> Router:
    generator = torch.Generator().manual_seed(3)
    count = len(labels)
    static = ref.within == "static"
    return grouped_router(
        ref,
        experts=(A, B, C, D, E)[:count],
        labels=labels,
        weight=torch.zeros(count, 8) if static else torch.randn(count, 8, generator=generator),
        bias=torch.randn(count, generator=generator) if static else None,
        group_weight=torch.randn(len(ref.names()), 8, generator=generator),
        group_bias=torch.randn(len(ref.names()), generator=generator),
        general=general,
    )


LABELS = ("function", "function", "domain", "domain", "style")
FIVE = grouping(groups=LABELS, tau_group=0.8, tau_expert=1.3)


def tokens(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(7))


def test_weights_of_a_group_are_its_share_times_those_within_it() -> None:
    # Groups (.6, .3, .1) and in the first (.5, .4, .1): .30, .24, .06, and with lambda .7 the first contributes .21.
    groups = torch.tensor([[0.6, 0.3, 0.1]]).log()
    experts = torch.tensor([[0.5, 0.4, 0.1, 1.0, 1.0]]).log()
    member = torch.tensor([0, 0, 0, 1, 2])
    everything = {"group_allowed": torch.ones(1, 3).bool(), "allowed": torch.ones(1, 5).bool()}
    weights = grouped_weights(groups, experts, **everything, member=member, epsilon=torch.zeros(1))
    torch.testing.assert_close(weights, torch.tensor([[0.30, 0.24, 0.06, 0.3, 0.1]]))
    ref = grouping(groups=("a", "a", "a", "b", "c"), within="static", share=0.7, general=GENERAL)
    router = grouped_router(
        ref,
        experts=(A, B, C, D, E),
        labels=ref.groups,
        weight=torch.zeros(5, 8),
        bias=experts[0],
        group_weight=torch.zeros(3, 8),
        group_bias=groups[0],
        general=GENERAL,
    )
    weights = weigh(router, torch.randn(1, 8), kind="grouped", top_k=5)
    torch.testing.assert_close(weights, torch.tensor([[0.21, 0.168, 0.042, 0.21, 0.07, 0.30]]))


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("open_groups", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("within", ["input", "static"])
def test_grouped_weights_equal_the_loop(within: str, open_groups: tuple[bool, ...], epsilon: float) -> None:
    ref = FIVE.model_copy(update={"within": within, "epsilon": epsilon})
    router, x = random_router(ref, LABELS), tokens()
    groups = router.groups
    assert groups is not None
    router = replace(router, groups=replace(groups, allowed=torch.tensor(open_groups)))
    logits = x @ router.weight.t() + (0 if router.bias is None else router.bias)
    group_logits = (x @ groups.weight.t() + groups.bias) / 0.8
    expected = grouped_by_loop(group_logits, logits / 1.3, [0, 0, 1, 1, 2], open_groups, epsilon)
    weights = weigh(router, x, kind="grouped", top_k=5)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(weights == 0, expected == 0)
    skipped = 1 - weights.sum(1)
    assert (skipped > -1e-6).all()
    assert (skipped <= 2 * epsilon + 1e-6).all()


def test_no_expert_weighs_more_than_its_group() -> None:
    weights = weigh(random_router(FIVE, LABELS), tokens(50), kind="grouped", top_k=5)
    of_group = torch.stack([weights[:, :2].sum(1), weights[:, 2:4].sum(1), weights[:, 4]], dim=1)
    assert (weights <= of_group[:, [0, 0, 1, 1, 2]]).all()
    torch.testing.assert_close(of_group.sum(1), torch.ones(50))


def test_a_group_without_an_expert_in_a_layer_gets_no_share_there() -> None:
    router = random_router(FIVE, ("function", "style"))
    assert router.groups is not None
    assert router.groups.allowed.tolist() == [True, False, True]
    torch.testing.assert_close(weigh(router, tokens(), kind="grouped", top_k=5).sum(1), torch.ones(6))


def test_a_masked_group_has_exactly_no_weight_and_the_rest_shares_all() -> None:
    mixture = one_layer(random_router(FIVE, LABELS))
    masked = controlled(mixture, {}, ["domain"])
    assert masked.routers[3].experts == (A, B, E)
    before = weigh(mixture.routers[3], tokens(), kind="grouped", top_k=5)[:, [0, 1, 4]]
    after = weigh(masked.routers[3], tokens(), kind="grouped", top_k=5)
    torch.testing.assert_close(after, before / before.sum(1, keepdim=True))


def test_a_bias_is_added_to_the_logit_of_the_group_before_its_temperature() -> None:
    mixture = one_layer(random_router(FIVE, LABELS))
    groups = mixture.routers[3].groups
    assert groups is not None
    shifted = weigh(controlled(mixture, {"style": 2.0}, []).routers[3], tokens(), kind="grouped", top_k=5)
    group_logits = (tokens() @ groups.weight.t() + groups.bias + torch.tensor([0.0, 0.0, 2.0])) / 0.8
    torch.testing.assert_close(shifted[:, 4], torch.softmax(group_logits, dim=1)[:, 2])


def test_what_a_request_makes_of_a_mixture_is_part_of_its_identity() -> None:
    mixture = one_layer(random_router(FIVE, LABELS), by_request=True)
    plain = controlled(mixture, {"style": 0.0}, [])
    one, same = (controlled(mixture, {"style": 1.0}, ["domain"]) for _ in range(2))
    others = [
        controlled(mixture, {"style": 1.5}, ["domain"]),
        controlled(mixture, {"style": 1.0}, ["function"]),
        controlled(mixture, {"domain": 1.0}, []),
        fixed_for(mixture, tokens(1)[0]),
        fixed_for(mixture, tokens(2)[1]),
    ]
    assert plain is mixture
    assert one.digest == same.digest
    assert len({mixture.digest, one.digest, *(other.digest for other in others)}) == 7


def test_weights_fixed_for_a_prompt_are_those_of_its_summary_and_drop_what_is_skipped() -> None:
    ref = FIVE.model_copy(update={"epsilon": 0.3})
    mixture = one_layer(random_router(ref, LABELS), by_request=True)
    residual = torch.randn(9, 8, generator=torch.Generator().manual_seed(2)) * 40
    s = summary(residual)
    torch.testing.assert_close(s.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(s / s.norm(), residual[1:].mean(0) / residual[1:].mean(0).norm())
    fixed = fixed_for(mixture, s)
    expected = weigh(mixture.routers[3], s.unsqueeze(0), kind="grouped", top_k=5)[0]
    assert (fixed.kind, fixed.by_request) == ("fixed", False)
    assert 0 < len(fixed.routers[3].experts) < 5
    got = dict(zip(fixed.routers[3].experts, weigh(fixed.routers[3], tokens(), kind="fixed", top_k=5)[4], strict=True))
    assert got == {digest: weight for digest, weight in zip((A, B, C, D, E), expected, strict=True) if weight > 0}
    assert fixed_for(one_layer(mixture.routers[3]), s).kind == "grouped"


@pytest.mark.parametrize(
    ("bias", "mask", "message"),
    [
        ({"tone": 1.0}, [], r"group_bias='tone': the groups of task both are function, domain, style"),
        ({}, ["tone"], r"group_mask='tone'"),
        ({}, ["function", "domain", "style"], r"group_mask=.*leaves no group"),
    ],
)
def test_a_control_that_cannot_be_followed_is_refused_by_name(
    bias: dict[str, float], mask: list[str], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        controlled(one_layer(random_router(FIVE, LABELS)), bias, mask)


def test_a_mixture_without_groups_refuses_any_control() -> None:
    plain = one_layer(Router(torch.zeros(2, 8), (A, B)), kind="top_k")
    with pytest.raises(InvalidInputError, match=r"group_bias=.'style'.*no grouped router"):
        controlled(plain, {"style": 1.0}, [])


@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 6), (2, 10)], [(1, 3)]])
def test_an_arrow_prototype_is_the_first_right_singular_vector(shapes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(1)
    updates = [
        (torch.randn(rank, 12, generator=generator), torch.randn(height, rank, generator=generator))
        for rank, height in shapes
    ]
    stacked = torch.cat([b @ a for a, b in updates]).double()
    expected = torch.linalg.svd(stacked).Vh[0].float()
    prototype = arrow_prototype(updates)
    torch.testing.assert_close(prototype.abs(), expected.abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((prototype @ expected).abs(), torch.tensor(1.0))
    assert prototype[prototype.abs().argmax()] > 0


def test_an_update_of_zero_has_no_direction() -> None:
    assert not arrow_prototype([(torch.randn(2, 5), torch.zeros(3, 2))]).any()


def test_arrow_keeps_the_prototypes_that_a_token_lies_along_whatever_its_sign() -> None:
    router = Router(torch.eye(8)[:3], (A, B, C))
    x = torch.zeros(1, 8)
    x[0, :3] = torch.tensor([-3.0, 2.0, 1.0])
    weights = weigh(router, x, kind="arrow", top_k=2)
    torch.testing.assert_close(weights[0], torch.cat((torch.softmax(torch.tensor([3.0, 2.0]), 0), torch.zeros(1))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "grouped"}, "exactly a grouped router has a grouping"),
        ({"kind": "top_k", "grouping": grouping()}, "exactly a grouped router has a grouping"),
        ({"kind": "grouped", "grouping": grouping(groups=("a",))}, "must fit 3 visible"),
        ({"kind": "grouped", "top_k": 2, "grouping": grouping()}, "must fit 3 visible"),
        ({"kind": "grouped", "grouping": grouping(share=0.5, general=A)}, "must not be one of the visible"),
    ],
)
def test_a_router_record_that_contradicts_itself_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterRef(**{"digest": A, "top_k": 3, "visible": (A, B, C), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"share": 0.5}, {"general": A}])
def test_a_general_expert_and_its_share_come_together(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be 1 without a general expert set"):
        grouping(**fields)


def test_a_manifest_of_before_groups_and_kinds_still_loads(three_tasks: object) -> None:
    manifest = three_tasks.repertoire.manifest()  # type: ignore[attr-defined]
    record = manifest.model_dump(mode="json")
    del record["groups"], record["base"]["attention_width"], record["base"]["kv_width"]
    for task in record["tasks"]:
        del task["router"]["grouping"]
    import json

    old = parse_manifest(json.dumps(record).encode(), source="old", generation=manifest.generation)
    assert (old.groups, old.base.kv_width, old.tasks) == ((), None, manifest.tasks)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"name": "a", "experts": [GENERAL]}], "is not listed"),
        ([{"name": "a", "experts": ["first"]}, {"name": "a", "experts": ["second"]}], "a name occurs twice"),
        ([{"name": "a", "experts": ["first"]}, {"name": "b", "experts": ["first"]}], "is in two groups"),
        ([{"name": "a", "experts": []}], "at least 1 item"),
    ],
)
def test_groups_that_do_not_fit_the_expert_sets_are_refused(
    three_tasks: object, groups: list[dict[str, object]], message: str
) -> None:
    import json

    manifest = three_tasks.repertoire.manifest()  # type: ignore[attr-defined]
    record = manifest.model_dump(mode="json")
    digests = {"first": manifest.experts[0].digest, "second": manifest.experts[1].digest, GENERAL: GENERAL}
    record["groups"] = [{**group, "experts": [digests[d] for d in group["experts"]]} for group in groups]  # type: ignore[attr-defined]
    with pytest.raises(ManifestError, match=message):
        parse_manifest(json.dumps(record).encode(), source="new", generation=manifest.generation)


def test_a_copy_of_a_manifest_looks_up_its_own_tasks_and_experts(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    first = manifest.experts[0]
    assert manifest.task("blue").name == "blue"
    assert manifest.expert_set(first.digest).units == first.units
    shorter = first.model_copy(update={"units": first.units[:1]})
    copied = manifest.model_copy(update={"experts": (shorter,), "tasks": manifest.tasks[:1]})
    assert copied.expert_set(first.digest).units == first.units[:1]
    with pytest.raises(UnknownTaskError):
        copied.task("blue")
