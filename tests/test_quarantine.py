"""Bad experts, each kind caused once: they fail their own requests with their own reason, and nobody else's."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.follower import HeadFollower
from runtime.errors import (
    BlobMissingError,
    BudgetError,
    DigestMismatchError,
    GreenroomError,
    InvalidInputError,
    ManifestError,
    NonFiniteError,
    RankLimitError,
    TensorMismatchError,
    UnboundExpertError,
    UnknownTaskError,
)
from runtime.memory.slot import State

MakeEngine = Callable[..., Engine]


def blob_of(workshop: Workshop, task: str) -> Path:
    digest = workshop.repertoire.manifest().task(task).experts
    assert digest is not None
    return workshop.repertoire.blob_path(digest)


def edit_set(workshop: Workshop, task: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite what the current manifest says of a task's expert set."""
    number = workshop.repertoire.manifest().generation
    path = workshop.repertoire.manifest_path(number)
    manifest = json.loads(path.read_text())
    change(next(entry for entry in manifest["experts"] if entry["task"] == task))
    path.write_text(json.dumps(manifest))


def bind_nothing(workshop: Workshop) -> None:
    edit_set(workshop, "blue", lambda entry: entry["units"][0].update(ranks={}))


def pickle_it(workshop: Workshop) -> None:
    path = blob_of(workshop, "blue")
    data = pickle.dumps({"weight": [1.0]})
    path.write_bytes(data + bytes(path.stat().st_size - len(data)))


def write_nan(workshop: Workshop) -> None:
    """NaN under a digest that is right: written by somebody who checked nothing."""
    path = blob_of(workshop, "blue")

    def change(entry: dict[str, Any]) -> None:
        unit, data = entry["units"][0], bytearray(path.read_bytes())
        data[unit["offset"] : unit["offset"] + 4] = torch.tensor([torch.nan]).numpy().tobytes()
        path.write_bytes(data)
        unit["sha256"] = hashlib.sha256(data[unit["offset"] : unit["offset"] + unit["bytes"]]).hexdigest()

    edit_set(workshop, "blue", change)


def change_nothing(_workshop: Workshop) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "options", "error", "reason"),
    [
        (bind_nothing, {}, UnboundExpertError, "NO_MODULE_BOUND"),
        (change_nothing, {"max_rank": 4}, RankLimitError, "RANK_OVER_LIMIT"),  # blue's is 8
        (pickle_it, {}, TensorMismatchError, "TENSOR_MISMATCH"),
        (write_nan, {}, NonFiniteError, "NON_FINITE_WEIGHT"),
    ],
)
def test_a_bad_expert_is_quarantined_under_its_own_reason_and_the_other_tasks_answer_as_before(  # noqa: PLR0917
    three_tasks: Workshop,
    make_engine: MakeEngine,
    prototypes: dict[str, str],
    damage: Callable[[Workshop], None],
    options: dict[str, int],
    error: type[GreenroomError],
    reason: str,
) -> None:
    before = ask(make_engine(three_tasks), prototypes["green"]).wait().tokens
    damage(three_tasks)
    engine = make_engine(three_tasks, **options)
    for _ in range(2):
        failed = ask(engine, prototypes["blue"], task="blue").wait().error
        assert isinstance(failed, error)
        assert failed.reason == reason
    assert any(entry.error == reason for entry in engine.memory.residency())
    assert ask(engine, prototypes["green"]).wait().tokens == before


def test_a_mended_expert_is_served_again_as_soon_as_something_is_published(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    path, data = blob_of(three_tasks, "blue"), blob_of(three_tasks, "blue").read_bytes()
    pickle_it(three_tasks)
    assert ask(engine, "x", task="blue").wait().error is not None
    path.write_bytes(data)
    assert ask(engine, "x", task="blue").wait().error is not None, "it is still quarantined"
    three_tasks.publish("grey", "%%%% ####")
    HeadFollower(three_tasks.repertoire, engine, interval_s=60).look()
    assert ask(engine, "x", task="blue").wait().finished.reason == "length"


def test_a_blob_deleted_under_a_running_server_is_missed_only_when_it_must_be_read_again(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "x", task="blue").wait().tokens
    path = blob_of(three_tasks, "blue")
    data = path.read_bytes()
    path.unlink()
    assert ask(engine, "x", task="blue").wait().tokens == answer, "it is in memory"
    assert engine.evict("blue") > 0
    assert isinstance(ask(engine, "x", task="blue").wait().error, BlobMissingError)
    assert ask(engine, "x", task="green").wait().finished.reason == "length"
    path.write_bytes(data)
    engine.memory.forgive()
    assert ask(engine, "x", task="blue").wait().tokens == answer


@pytest.mark.parametrize("place", [0, -1])
def test_a_bit_that_flips_after_the_first_load_is_found_when_the_expert_is_read_again(
    three_tasks: Workshop, make_engine: MakeEngine, place: int
) -> None:
    engine = make_engine(three_tasks)
    assert ask(engine, "x", task="blue").wait().finished.reason == "length"
    path = blob_of(three_tasks, "blue")
    was, data = path.stat(), bytearray(path.read_bytes())
    entry = next(entry for entry in three_tasks.repertoire.manifest().experts if entry.task == "blue")
    data[entry.units[place].offset] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # as a disk that rots does: no date tells of it
    engine.evict("blue")
    error = ask(engine, "x", task="blue").wait().error
    assert isinstance(error, DigestMismatchError)
    assert f"layer {entry.units[place].layer}" in str(error)


@pytest.mark.parametrize("escape", ["../../../../etc/passwd", "/etc/passwd", "a" * 63 + "/"])
def test_a_generation_that_names_files_outside_its_folder_is_refused_and_the_served_one_goes_on(
    workshop: Workshop, make_engine: MakeEngine, escape: str
) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop)
    workshop.publish("green", "12 34")
    edit_set(workshop, "green", lambda entry: entry.update(digest=escape))
    with pytest.raises(ManifestError, match="digest"):
        HeadFollower(workshop.repertoire, engine, interval_s=60).look()
    assert ask(engine, "x", task="red").wait().located.generation == 1


def test_a_generation_for_another_base_is_refused_and_the_served_one_goes_on(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop)
    workshop.publish("green", "12 34")
    path = workshop.repertoire.manifest_path(2)
    manifest = json.loads(path.read_text())
    manifest["base"]["digest"] = "f" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match="base"):
        HeadFollower(workshop.repertoire, engine, interval_s=60).look()
    assert ask(engine, "x", task="red").wait().located.generation == 1


# ---- what people do to memory by hand


def ready(engine: Engine, task: str) -> int:
    """Units of a task's own set that are in memory."""
    digest = engine.generation.manifest.task(task).experts
    return sum(
        list(entry.units.values()).count(State.READY) for entry in engine.memory.residency() if entry.digest == digest
    )


def test_a_task_read_ahead_by_order_is_there_and_held_by_nobody(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    engine.prefetch_task("blue")
    wanted = engine.visible.of(engine.generation, "blue").wanted  # routers too
    engine.wait_until(lambda: all(engine.memory.state(each.key) is State.READY for each in wanted))
    read = engine.memory.statistics()
    assert (read.reserved_bytes, read.prefetch_useful_bytes) == (0, 0)
    ask(engine, "x", task="blue").wait()
    asked = engine.memory.statistics()
    assert asked.misses == read.misses, "the answer waited for no read"
    assert asked.demanded_bytes == 0


def test_a_pinned_task_stays_through_pressure_and_follows_a_publish_until_it_is_unpinned(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    for name, prototype in (("red", "aaaa"), ("green", "1234"), ("blue", "????")):
        workshop.publish(name, prototype, top_k=1)
    engine = make_engine(workshop)
    engine.pin("red")
    engine.pin("red")  # twice is once
    engine.wait_until(lambda: ready(engine, "red") == 2)
    with pytest.raises(InvalidInputError, match="unpin it first"):
        engine.evict("red")
    workshop.publish("grey", "%%%%")
    HeadFollower(workshop.repertoire, engine, interval_s=60).look()
    for task in ("green", "blue", "grey"):
        ask(engine, "x", task=task).wait()
        engine.evict(task)
    assert ready(engine, "red") == 2
    assert engine.memory.statistics().pinned_bytes > 0
    engine.unpin("red")
    assert engine.memory.statistics().pinned_bytes == 0
    assert engine.evict("red") > 0
    assert ready(engine, "red") == 0
    with pytest.raises(InvalidInputError, match="is not pinned"):
        engine.unpin("red")


def test_what_cannot_be_pinned_is_refused_and_leaves_memory_as_it_was(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks, expert_budget_bytes=5000)
    with pytest.raises(BudgetError):
        engine.pin("blue")
    for call in (engine.pin, engine.prefetch_task, engine.evict):
        with pytest.raises(UnknownTaskError):
            call("purple")
    assert engine.memory.statistics().reserved_bytes == 0
