"""Removing a task: a generation without it, in which every other task answers as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import ask
from repertoires import PROTOTYPES, Workshop
from typer.testing import CliRunner

from greenroom.cli.main import app
from runtime.engine.engine import Engine
from runtime.errors import TaskInUseError, UnknownTaskError
from runtime.model.audit import audit
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.removal import remove_task
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Group


def test_the_newest_task_goes_with_its_experts_router_and_density(three_tasks: Workshop) -> None:
    before = three_tasks.repertoire.manifest()
    after = remove_task(three_tasks.repertoire, "blue")
    assert (after.generation, after.parent, after.task_names()) == (4, 3, ("red", "green"))
    assert after.tasks == before.tasks[:2]
    assert after.experts == before.experts[:2]
    assert three_tasks.repertoire.manifest() == after
    opened = open_generation(three_tasks.repertoire)
    assert opened.locator.tasks == ("red", "green")
    assert not audit(three_tasks.repertoire, [4]).faults


def test_a_task_that_others_depend_on_stays_and_they_are_named(three_tasks: Workshop) -> None:
    with pytest.raises(TaskInUseError, match="task red cannot be removed: the routers of green, blue use its experts"):
        remove_task(three_tasks.repertoire, "red")
    assert three_tasks.repertoire.head() == 3


def test_experts_may_stay_without_a_task_and_others_answer_bit_for_bit_as_before(
    three_tasks: Workshop, make_engine: Callable[..., Engine]
) -> None:
    before = three_tasks.repertoire.manifest()
    after = remove_task(three_tasks.repertoire, "red", keep_experts=True)
    assert after.task_names() == ("green", "blue")
    assert after.experts == before.experts
    old, new = make_engine(three_tasks, 3), make_engine(three_tasks, 4)
    for task in ("green", "blue"):
        one, other = (ask(engine, "aaa 123", task=task).wait() for engine in (old, new))
        assert one.finished.logits == other.finished.logits
    located = ask(new, PROTOTYPES["red"]).wait().located
    assert located.task in ("green", "blue")


def test_a_task_can_come_again_after_it_was_removed(three_tasks: Workshop) -> None:
    remove_task(three_tasks.repertoire, "red", keep_experts=True)
    after = three_tasks.publish("red", "other words")
    assert after.task_names() == ("green", "blue", "red")
    assert [entry.task for entry in after.experts] == ["red", "green", "blue", "red"]
    assert open_generation(three_tasks.repertoire).faults == {}


def test_removed_experts_leave_their_groups_and_empty_groups_go(three_tasks: Workshop) -> None:
    repertoire = three_tasks.repertoire
    current = repertoire.manifest()
    red, _, blue = (entry.digest for entry in current.experts)
    groups = (Group(name="both", experts=(red, blue)), Group(name="alone", experts=(current.experts[1].digest,)))
    grouped = current.model_copy(update={"generation": 4, "parent": 3, "groups": groups})
    repertoire.publish(grouped, {}, expected=3)
    assert [group.experts for group in remove_task(repertoire, "blue").groups] == [(red,), groups[1].experts]
    assert [group.name for group in remove_task(repertoire, "green").groups] == ["both"]


def test_the_last_task_may_go_and_an_unknown_one_is_named(workshop: Workshop, tiny_base: BaseModel) -> None:
    workshop.publish("red", "aaaa")
    with pytest.raises(UnknownTaskError, match="pink"):
        remove_task(workshop.repertoire, "pink")
    assert remove_task(workshop.repertoire, "red").tasks == ()
    feature = torch.zeros(1, tiny_base.info.width)
    assert open_generation(workshop.repertoire).locator.locate(feature)[0].task is None


def test_the_command_removes_and_says_so(three_tasks: Workshop, tmp_path: Path) -> None:
    root = str(three_tasks.repertoire.root)
    refused = CliRunner().invoke(app, ["repertoire", "remove", "red", "--repertoire", root])
    assert refused.exit_code != 0
    done = CliRunner().invoke(app, ["repertoire", "remove", "red", "--repertoire", root, "--keep-experts"])
    assert done.exit_code == 0, done.output
    assert "generation 4: red removed, 2 tasks left" in done.output
    assert Repertoire(Path(root)).manifest().task_names() == ("green", "blue")
