"""New generations under a running engine: new requests get them, running ones keep theirs, old ones retire."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.follower import HeadFollower, open_held
from runtime.engine.generations import Generations
from runtime.errors import InvalidInputError, ManifestError, UnknownTaskError
from runtime.model.generation import open_generation

MakeEngine = Callable[..., Engine]


def follower(workshop: Workshop, engine: Engine) -> HeadFollower:
    return HeadFollower(workshop.repertoire, engine, interval_s=60)


def test_a_task_published_while_serving_is_answered_without_a_restart(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop)
    with pytest.raises(UnknownTaskError):
        ask(engine, "x", task="green")
    workshop.publish("green", "12 34")
    assert follower(workshop, engine).look() == 2
    answer = ask(engine, "x", task="green").wait()
    assert (answer.located.task, answer.located.generation) == ("green", 2)
    assert engine.statistics().generations == (2,)


def test_a_running_request_keeps_its_generation_and_its_answer(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop)
    alone = ask(engine, "x", task="red", max_tokens=150).wait()
    running = ask(engine, "x", task="red", max_tokens=150)
    assert running.began.wait(30)
    workshop.publish("green", "12 34")
    follower(workshop, engine).look()
    later = ask(engine, "x", task="red", max_tokens=2).wait()
    assert later.located.generation == 2
    assert running.wait().tokens == alone.tokens
    assert running.located.generation == 1
    assert engine.statistics().generations == (2,), "generation 1 has retired"


def test_a_generation_retires_when_its_last_user_has_left(three_tasks: Workshop) -> None:
    first, second = (open_generation(three_tasks.repertoire, number) for number in (1, 2))
    retired: list[int] = []
    served = Generations(first, retire=lambda: retired.append(1))
    users = [served.enter(), served.enter()]
    served.publish(second, retire=lambda: retired.append(2))
    assert served.enter() is second
    for user in users:
        assert retired == []
        served.leave(user)
    assert retired == [1]
    served.close()
    assert retired == [1], "its last request has not ended"
    served.leave(second)
    served.close()
    assert retired == [1, 2]


def test_what_cannot_replace_the_current_generation_is_refused(three_tasks: Workshop) -> None:
    generation = open_generation(three_tasks.repertoire)
    served = Generations(generation, retire=lambda: None)
    with pytest.raises(InvalidInputError, match="generation=3: is being served already"):
        served.publish(generation, retire=lambda: None)
    manifest = generation.manifest
    for field, change in (
        ("first_layer", {"first_layer": 1}),
        ("base", {"base": manifest.base.model_copy(update={"digest": "f" * 64})}),
    ):
        other = type(generation)(**{**vars(generation), "manifest": manifest.model_copy(update=change)})
        with pytest.raises(InvalidInputError, match=field):
            served.publish(other, retire=lambda: None)
    assert served.current is generation


def test_a_broken_newest_generation_is_reported_once_and_the_old_one_goes_on(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop)
    workshop.publish("green", "12 34")
    (workshop.repertoire.root / "generations" / "000002.json").write_text("{}")
    following = follower(workshop, engine)
    with pytest.raises(Exception, match="schema_version"):
        following.look()
    assert following.look() is None, "not tried again until HEAD moves"
    assert ask(engine, "x", task="red").wait().located.generation == 1
    (workshop.repertoire.root / "HEAD").write_text("what\n")
    with pytest.raises(ManifestError):
        following.look()


def test_a_generation_that_is_served_is_held_against_the_collector(three_tasks: Workshop) -> None:
    generation, let_go = open_held(three_tasks.repertoire, 1)
    assert generation.manifest.generation == 1
    from runtime.model.lease import sole_lease

    path = three_tasks.repertoire.root / "generations" / "000001.json"
    with sole_lease(path) as alone:
        assert not alone
    let_go()
    with sole_lease(path) as alone:
        assert alone
