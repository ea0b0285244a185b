"""Grouped routers: what their training changes and what it leaves alone, what is published, and the data for it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ask
from repertoires import Workshop
from typer.testing import CliRunner

from greenroom.cli.main import app
from runtime.engine.engine import Engine
from runtime.errors import InvalidInputError, NonFiniteError, UnknownTaskError
from runtime.model.attach import attached, hold_mixture
from runtime.model.control import controlled, fixed_for, summary
from runtime.model.generation import open_generation
from runtime.model.manifest import Manifest
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Grouping
from training.batches import encode_row
from training.compose import compose
from training.composite_data import (
    APART,
    COMPOSITE,
    GROUPS,
    INTENTS,
    UNSEEN_FILE,
    composite_examples,
    intent_examples,
    parts,
    pieces,
    shared_examples,
    write_composite_data,
)
from training.config import TrainingConfig
from training.data import Example, TaskData, read_examples, read_task_folder, read_tasks
from training.grouped import GroupedRouting, frozen_mixture, prompt_summaries, train_routings
from training.router_options import RouterOptions

CONFIG = TrainingConfig(epochs=20, max_steps=30, batch_size=8, router_learning_rate=3e-2, locator_steps=5)
GROUPED = {"letters": ["red"], "digits": ["green", "blue"]}
DATA = TaskData(
    "both",
    tuple(Example(letter * (5 + i), answer) for i in range(8) for letter, answer in (("a", "x"), ("7", "y"))),
    (Example("aaaa", "x"),),
)


def composed(workshop: Workshop, **options: Any) -> Manifest:
    """Random experts of red, green and blue, green being the general one if a share says so, under a trained router."""
    groups = {name: [task for task in tasks if options.get("general") != task] for name, tasks in GROUPED.items()}
    return compose(
        workshop.repertoire, workshop.base, DATA, groups=groups, options=RouterOptions(**options), config=CONFIG
    )


def losses_of(workshop: Workshop, **options: Any) -> list[float]:
    losses: list[float] = []
    compose(
        workshop.repertoire,
        workshop.base,
        DATA,
        groups=GROUPED,
        options=RouterOptions(**options),
        config=CONFIG,
        on_progress=lambda _step, _num, loss: losses.append(loss),
    )
    return losses


KINDS: list[dict[str, Any]] = [
    {},
    {"scope": "request"},
    {"within": "static", "tau_group": 0.5},
    {"general": "green", "share": 0.7},
]


@pytest.mark.parametrize("options", KINDS)
def test_training_a_router_lowers_the_loss(three_tasks: Workshop, options: dict[str, Any]) -> None:
    losses = losses_of(three_tasks, **options)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.995 * sum(losses[:5])  # the experts are random


@pytest.mark.parametrize("options", KINDS)
def test_a_trained_router_is_published_as_a_task_that_the_engine_answers(
    three_tasks: Workshop, make_engine: Callable[..., Engine], options: dict[str, Any]
) -> None:
    manifest = composed(three_tasks, **options)
    red, green, blue = (entry.digest for entry in manifest.experts)
    task = manifest.task("both")
    assert task.experts is None
    assert task.router.kind == "grouped"
    has_general = "general" in options
    assert task.router.visible == ((red, blue) if has_general else (red, green, blue))
    assert [group.name for group in manifest.groups] == ["letters", "digits"]
    answer = ask(make_engine(three_tasks), "aaaa", task="both", max_tokens=3, explain=True).wait()
    expected = three_tasks.reference("aaaa", "both", 3)
    torch.testing.assert_close(answer.logits(three_tasks.base.info.vocab_size), expected, atol=2e-4, rtol=1e-3)
    for layer in answer.finished.explanation:
        share = options.get("share", 1.0)
        assert sum(layer.groups.values()) == pytest.approx(share, abs=0.05)  # a group below epsilon is skipped


def test_training_a_router_moves_neither_the_base_nor_any_expert_nor_older_tasks(three_tasks: Workshop) -> None:
    before = copy.deepcopy(three_tasks.base.model.state_dict())
    logits = three_tasks.reference("aaaa", "blue", 2)
    old = three_tasks.repertoire.manifest()
    new = composed(three_tasks)
    after = three_tasks.base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (new.experts, new.tasks[:3]) == (old.experts, old.tasks)
    assert torch.equal(three_tasks.reference("aaaa", "blue", 2), logits)


def test_one_seed_gives_one_router(three_tasks: Workshop, tmp_path: Path) -> None:
    digests = []
    for seed in (0, 0, 1):
        repertoire = Repertoire(tmp_path / str(len(digests)))
        shutil.copytree(three_tasks.repertoire.root, repertoire.root)
        manifest = compose(
            repertoire,
            three_tasks.base,
            DATA,
            groups=GROUPED,
            options=RouterOptions(),
            config=dataclasses.replace(CONFIG, max_steps=2, seed=seed),
        )
        digests.append(manifest.task("both").router.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_prompt_is_summarised_in_training_as_in_serving(three_tasks: Workshop) -> None:
    row = encode_row(three_tasks.base, default_template(three_tasks.base), "some words", "x", max_tokens=100)
    trained = prompt_summaries(three_tasks.base, [row.prompt, row.prompt[:3]], three_tasks.first_layer)
    torch.testing.assert_close(trained[0], summary(three_tasks.residual("some words")))


def test_a_group_of_a_trained_router_can_be_masked(three_tasks: Workshop) -> None:
    composed(three_tasks)
    opened = open_generation(three_tasks.repertoire)
    only = controlled(opened.mixture("both"), {}, ["digits"])
    red = opened.manifest.experts[0].digest
    assert {router.experts for router in only.routers.values()} == {(red,)}
    ids = torch.tensor([opened.template.encode(three_tasks.base.tokenizer, "aaaa")])
    with attached(three_tasks.base.model, hold_mixture(three_tasks.repertoire, opened, only, three_tasks.base.model)):
        masked = three_tasks.base.model(ids).logits[0, -1]
    torch.testing.assert_close(masked, three_tasks.reference("aaaa", "red", 1)[0], atol=1e-4, rtol=1e-4)
    assert fixed_for(only, torch.zeros(64)) is only


def test_groups_of_the_repertoire_are_taken_where_none_are_named(three_tasks: Workshop) -> None:
    first = composed(three_tasks)
    other = dataclasses.replace(DATA, name="again")
    config = dataclasses.replace(CONFIG, max_steps=1)
    second = compose(three_tasks.repertoire, three_tasks.base, other, groups={}, options=RouterOptions(), config=config)
    assert second.groups == first.groups
    assert second.tasks[-1].router.visible == first.tasks[-1].router.visible
    moved = compose(
        three_tasks.repertoire,
        three_tasks.base,
        dataclasses.replace(DATA, name="third"),
        groups={"new": ["red"]},
        options=RouterOptions(),
        config=config,
    )
    assert [(group.name, len(group.experts)) for group in moved.groups] == [("digits", 2), ("new", 1)]


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        ({}, {}, InvalidInputError, "name groups, such as"),
        ({"a": ["red"], "b": ["red"]}, {}, InvalidInputError, "group='b=red': is in a group already"),
        ({"a": ["pink"]}, {}, UnknownTaskError, "task='pink'"),
        ({"A b": ["red"]}, {}, InvalidInputError, "group='A b'"),
        ({"a": ["red"]}, {"general": "red", "share": 0.5}, InvalidInputError, "name groups, such as"),
    ],
)
def test_groups_that_cannot_be_mixed_are_refused(
    three_tasks: Workshop, groups: dict[str, list[str]], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        compose(
            three_tasks.repertoire,
            three_tasks.base,
            DATA,
            groups=groups,
            options=RouterOptions(**options),
            config=CONFIG,
        )
    assert three_tasks.repertoire.head() == 3


def test_an_empty_repertoire_has_nothing_to_mix(workshop: Workshop) -> None:
    with pytest.raises(InvalidInputError, match="holds no tasks"):
        compose(workshop.repertoire, workshop.base, DATA, groups={}, options=RouterOptions(), config=CONFIG)


def test_a_loss_that_is_no_number_ends_the_training(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    entry = manifest.experts[0]
    experts = {unit.layer: three_tasks.repertoire.read_unit(entry, unit, manifest.base) for unit in entry.units}

    def broken(labels: Sequence[str], has_general: bool, generator: torch.Generator) -> GroupedRouting:
        grouping = Grouping(
            groups=("a",),
            scope="token",
            within="input",
            tau_group=1.0,
            tau_expert=1.0,
            epsilon=0.0,
            share=1.0,
            general=None,
        )
        routing = GroupedRouting(grouping, labels, 64, has_general=has_general, generator=generator)
        torch.nn.init.constant_(routing.group_bias, float("nan"))
        return routing

    base = three_tasks.base
    ffns = frozen_mixture(base, {"red": experts}, {"red": "a"}, {}, broken, seed=0)
    row = encode_row(base, default_template(base), "some words", "x", max_tokens=100)
    with pytest.raises(NonFiniteError, match="a lower router rate may help"):
        train_routings(base, ffns, [row], name="both", summaries=None, config=CONFIG)
    with pytest.raises(InvalidInputError, match="nothing to train on"):
        train_routings(base, ffns, [], name="both", summaries=None, config=CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scope": "layer"}, "scope='layer': must be one of token, request"),
        ({"within": "x"}, "within='x'"),
        ({"tau_group": 0.0}, r"tau_group=0\.0"),
        ({"tau_expert": float("inf")}, "tau_expert=inf"),
        ({"epsilon": 1.0}, r"epsilon=1\.0"),
        ({"share": 0.0, "general": "red"}, r"share=0\.0"),
        ({"share": 0.5}, "exactly where a general task is named"),
        ({"general": "red"}, "exactly where a general task is named"),
    ],
)
def test_options_of_a_router_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        RouterOptions(**fields)


def test_the_command_trains_a_router_over_named_groups(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path
) -> None:
    write_composite_data(tmp_path, num_train=16, num_test=2, seed=0)
    command = ["train-router", "--repertoire", str(three_tasks.repertoire.root), "--base", str(tiny_base_folder)]
    command += ["--data", str(tmp_path / COMPOSITE), "--max-steps", "1"]
    named = CliRunner().invoke(app, [*command, "--group", "a=red", "--group", "b=green,blue"])
    assert named.exit_code == 0, named.output
    assert "generation 4: composite added, a router over the groups a, b" in named.output
    bad = CliRunner().invoke(app, [*command, "--group", "a"])
    assert bad.exit_code != 0
    assert "group='a': must be name=task,task" in bad.output


# ---- composite data


def test_a_composite_row_asks_for_two_or_three_things_of_different_groups() -> None:
    group_of_answer = {"urgency": "function", "onset": "function", "code": "domain", "Yours": "style", "Take": "style"}
    counts = set()
    for row in composite_examples(num=200, seed=3):
        groups = [group_of_answer[part.split()[0]] for part in parts(row.output)]
        assert len(set(groups)) == len(groups)
        counts.add(len(groups))
    assert counts == {2, 3}
    assert tuple(GROUPS) == ("function", "domain", "style")
    assert sorted(task for tasks in GROUPS.values() for task in tasks) == sorted(INTENTS)


def test_rows_follow_from_the_seed_and_none_comes_twice(tmp_path: Path) -> None:
    one, same, other = (composite_examples(num=50, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len({row.input for row in one}) == 50
    write_composite_data(tmp_path, num_train=30, num_test=10, seed=1)
    data = read_task_folder(tmp_path / COMPOSITE)
    assert (*data.test, *data.train) == one[:40]
    assert {path.name for path in tmp_path.iterdir()} == {*INTENTS, COMPOSITE}
    assert read_examples(tmp_path / COMPOSITE / UNSEEN_FILE) == list(composite_examples(num=10, seed=1, unseen=True))


def intents_of(row: Example) -> set[str]:
    return set(pieces(row))


def test_pairs_that_are_kept_apart_meet_in_no_row_that_trains_and_in_every_unseen_question(tmp_path: Path) -> None:
    write_composite_data(tmp_path, num_train=60, num_test=30, seed=2)
    tasks = read_tasks(tmp_path)
    trains = [intents_of(row) for task in tasks for row in task.train]
    unseen = [intents_of(row) for row in read_examples(tmp_path / COMPOSITE / UNSEEN_FILE)]
    assert len(trains) > 400
    assert not any(set(pair) <= intents for intents in trains for pair in APART)
    assert all(any(set(pair) <= intents for pair in APART) for intents in unseen)
    met = {frozenset(pair) for intents in trains for pair in itertools.combinations(sorted(intents), 2)}
    assert len(met) == 12 - len(APART), "every other pair of groups' intents"


def test_no_question_is_the_input_of_a_row_that_trains(tmp_path: Path) -> None:
    write_composite_data(tmp_path, num_train=300, num_test=400, seed=0)
    tasks = {task.name: task for task in read_tasks(tmp_path)}
    trains = {row.input for task in tasks.values() for row in task.train}
    asked = [*tasks[COMPOSITE].test, *read_examples(tmp_path / COMPOSITE / UNSEEN_FILE)]
    assert not trains & {row.input for row in asked}
    drawn = {row.input for task in INTENTS for row in shared_examples(task, num=200, seed=0)}
    assert drawn & {row.input for row in asked}, "or this test would not see it"
    for task in INTENTS:
        assert not {row.input for row in tasks[task].train} & {row.input for row in tasks[task].test}


@pytest.mark.parametrize("task", INTENTS)
def test_an_expert_learns_its_own_part_alone_with_what_ends_it(task: str) -> None:
    places = set()
    for row in shared_examples(task, num=60, seed=0):
        assert row.learned is not None
        begins, _, after = row.output.partition(row.learned)
        assert row.learned.strip(" ;").startswith(INTENTS[task].begins)
        assert (row.learned.startswith(" "), row.learned.endswith(";")) == (bool(begins), bool(after))
        assert not begins or begins.endswith(";")
        places.add((bool(begins), bool(after)))
    assert len(places) == 3, "first, in the middle and last"


def test_the_rows_of_an_intent_are_a_third_alone_and_else_beside_others(tmp_path: Path) -> None:
    write_composite_data(tmp_path, num_train=30, num_test=6, seed=0)
    task = read_task_folder(tmp_path / "onset")
    assert [len(pieces(row)) for row in task.test] == [1] * 6
    assert (len(task.train), sum(row.learned is None for row in task.train)) == (30, 10)
    assert all(len(pieces(row)) > 1 for row in task.train if row.learned is not None)


@pytest.mark.parametrize("task", INTENTS)
def test_an_intent_alone_has_the_answer_that_it_has_in_a_composite(task: str) -> None:
    for row in intent_examples(task, num=20, seed=0):
        assert len(parts(row.output)) == 1


def test_no_more_rows_are_asked_of_an_intent_than_there_are() -> None:
    with pytest.raises(InvalidInputError, match="only about"):
        intent_examples("plain", num=100_000, seed=0)
    with pytest.raises(InvalidInputError, match="task='surgery'"):
        intent_examples("surgery", num=1, seed=0)
