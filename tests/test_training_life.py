"""Trainings that people can live with: killed and going on, stopped early, in pieces, in several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import Gate, child
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from runtime.errors import DataError, InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.repertoire import Repertoire
from training.batches import Row, collate
from training.config import TrainingConfig
from training.data import Example, TaskData, read_examples
from training.grow import add_task
from training.journal import CHECKPOINT_FILE, LOSSES_FILE, read_losses
from training.loop import Surroundings
from training.mixtures import fresh_experts, new_mixture
from training.patience import hold_out
from training.pictures import draw_losses
from training.steps import answer_loss
from training.task import TrainedTask, train_mixture, train_task

CONFIG = TrainingConfig(
    first_layer=2, max_steps=8, batch_size=4, locator_steps=2, store_dtype="float32", rank=2, checkpoint_every=3
)
ROWS = [Row((1, 5 + i % 7, 6), (20 + i % 3, 2)) for i in range(24)]
ROOT = Path(__file__).parent.parent


def task_of(name: str) -> TaskData:
    rows = tuple(Example(letter * (5 + i), str(i % 2)) for letter in "ab" for i in range(8))
    return TaskData(name, rows, rows[:2])


def tensors(trained: TrainedTask) -> list[torch.Tensor]:
    updates = [update for expert in trained.experts.values() for update in expert.updates.values()]
    return [*(u.a for u in updates), *(u.b for u in updates), *trained.routers.values()]


def trained(base: BaseModel, config: TrainingConfig, around: Surroundings | None = None) -> TrainedTask:
    return train_task(base, ROWS, [], name="one", first_layer=2, config=config, around=around)


# ---- going on after a kill


@pytest.mark.parametrize("settings", [{}, {"patience": 5, "evaluate_every": 2}], ids=["plain", "with held-out rows"])
def test_a_killed_training_goes_on_and_gives_the_same_bytes(
    tiny_base: BaseModel, tmp_path: Path, settings: dict[str, int]
) -> None:
    config = dataclasses.replace(CONFIG, **settings)

    def work(gate: Gate) -> int:
        def at_five(step: int, _num_steps: int, _loss: float) -> None:
            if step == 5:
                gate.reached()

        add_task(
            Repertoire(tmp_path / "killed"),
            tiny_base,
            task_of("one"),
            config,
            report_folder=tmp_path / "report",
            on_progress=at_five,
        )
        return 0

    with child(work) as process:
        process.wait_reached()
        process.kill()
    assert Repertoire(tmp_path / "killed").head() is None
    assert [line["step"] for line in read_losses(tmp_path / "report")] == [1, 2, 3, 4, 5]
    seen: list[int] = []
    resumed = add_task(
        Repertoire(tmp_path / "killed"),
        tiny_base,
        task_of("one"),
        config,
        report_folder=tmp_path / "report",
        on_progress=lambda step, _num_steps, _loss: seen.append(step),
    )
    assert seen == [4, 5, 6, 7, 8]
    whole = add_task(
        Repertoire(tmp_path / "whole"), tiny_base, task_of("one"), config, report_folder=tmp_path / "other"
    )
    assert resumed.to_json() == whole.to_json()
    for name in (LOSSES_FILE, "report.json"):
        assert (tmp_path / "report" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert not (tmp_path / "report" / CHECKPOINT_FILE).exists()


def test_a_checkpoint_of_another_training_is_refused_and_named(tiny_base: BaseModel, tmp_path: Path) -> None:
    around = Surroundings(folder=tmp_path)
    trained(tiny_base, CONFIG, around)
    assert (tmp_path / CHECKPOINT_FILE).is_file()
    with pytest.raises(InvalidInputError, match="is of a training with other data, settings"):
        trained(tiny_base, dataclasses.replace(CONFIG, learning_rate=1e-5), around)
    with pytest.raises(InvalidInputError, match="is of a training with other data"):
        train_task(tiny_base, ROWS[1:], [], name="one", first_layer=2, config=CONFIG, around=around)
    trained(tiny_base, dataclasses.replace(CONFIG, checkpoint_every=1), around)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match="is damaged"):
        trained(tiny_base, CONFIG, around)


def test_a_complete_training_that_was_not_published_costs_no_step_again(tiny_base: BaseModel, tmp_path: Path) -> None:
    first = trained(tiny_base, CONFIG, Surroundings(folder=tmp_path))
    seen: list[int] = []
    again = trained(
        tiny_base, CONFIG, Surroundings(folder=tmp_path, on_progress=lambda step, _num, _loss: seen.append(step))
    )
    assert seen == []
    assert again.losses == first.losses
    assert all(map(torch.equal, tensors(again), tensors(first)))


def test_every_step_is_a_line_and_the_lines_become_a_picture(tiny_base: BaseModel, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, patience=9, evaluate_every=4)
    losses = trained(tiny_base, config, Surroundings(folder=tmp_path)).losses
    lines = read_losses(tmp_path)
    assert [line["loss"] for line in lines] == list(losses)
    assert [line["step"] for line in lines if "held_out" in line] == [4, 8]
    draw_losses(lines, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


# ---- stopping early


def test_training_stops_when_held_out_loss_no_longer_falls_and_gives_back_the_best(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    wild = dataclasses.replace(
        CONFIG,
        max_steps=60,
        epochs=60,
        learning_rate=0.5,
        warmup_share=0.5,
        patience=2,
        evaluate_every=2,
        held_out=0.25,
    )
    found = trained(tiny_base, wild, Surroundings(folder=tmp_path))
    looks = {int(line["step"]): line["held_out"] for line in read_losses(tmp_path) if "held_out" in line}
    best = min(looks, key=lambda step: looks[step])
    assert len(found.losses) == max(looks) == best + 4 < 60
    _, held = hold_out(ROWS, share=0.25, seed=0)
    assert len(held) == 6
    short = trained(tiny_base, dataclasses.replace(wild, max_steps=60, patience=1000))
    assert len(short.losses) == 60
    shorter = dataclasses.replace(wild, patience=None, max_steps=1)
    assert len(trained(tiny_base, shorter).losses) == 1


def test_held_out_rows_are_a_share_and_never_train() -> None:
    train, held = hold_out(ROWS, share=0.1, seed=1)
    assert (len(train), len(held)) == (22, 2)
    assert hold_out(ROWS, share=0.1, seed=1) == (train, held)
    assert len(hold_out(ROWS[:2], share=0.01, seed=0)[1]) == 1
    with pytest.raises(InvalidInputError, match="examples=1: early stopping needs 2"):
        hold_out(ROWS[:1], share=0.5, seed=0)


# ---- pieces and processes


def test_a_step_in_pieces_is_the_step_of_the_whole_batch(tiny_base: BaseModel) -> None:
    uneven = [Row((1, 5), (7,) * (1 + i % 5) + (2,)) for i in range(24)]
    config = dataclasses.replace(CONFIG, balance_coefficient=0.0, max_steps=3)
    whole, pieces = (
        train_task(
            tiny_base, uneven, [], name="one", first_layer=2, config=dataclasses.replace(config, accumulation=pieces)
        )
        for pieces in (1, 3)
    )
    assert whole.losses == pytest.approx(pieces.losses, abs=1e-4)
    for one, other in zip(tensors(whole), tensors(pieces), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_two_processes_train_what_one_trains(tiny_base: BaseModel, tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "one"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        rows = [json.dumps({"input": example.input, "output": example.output}) for example in task_of("one").train]
        (folder / f"{part}.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-m", "greenroom.cli.main", "train", "--data", str(tmp_path / "data")]
    command += ["--repertoire", str(tmp_path / "rep"), "--base", str(tiny_base_folder), "--device", "cpu"]
    command += ["--dtype", "float32", "--rank", "2", "--batch-size", "3", "--max-steps", "4", "--first-layer", "2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert [process.returncode for process in processes] == [0, 0], outputs
    together = Repertoire(tmp_path / "rep")
    config = dataclasses.replace(TrainingConfig(), first_layer=2, rank=2, batch_size=3, max_steps=4, dtype="float32")
    alone = Repertoire(tmp_path / "alone")
    task = TaskData("one", tuple(read_examples(folder / "train.jsonl")), task_of("one").test)
    add_task(alone, tiny_base, task, config, report_folder=tmp_path / "report")
    found = [line["loss"] for line in read_losses(tmp_path / "rep-training" / "one")]
    assert found == pytest.approx([line["loss"] for line in read_losses(tmp_path / "report")], abs=1e-3)
    assert together.manifest().task_names() == ("one",)
    assert "generation 1: one added" in outputs[0]
    assert "generation 1" not in outputs[1]


# ---- bases that change their logits


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_the_loss_is_right_for_a_base_that_caps_or_divides_its_logits(tiny_base: BaseModel, kind: str) -> None:
    sizes = {
        "vocab_size": 267,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: torch.nn.Module
        if kind == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5))
        else:
            model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=5.0))
    base = dataclasses.replace(tiny_base, model=model.eval().requires_grad_(requires_grad=False))
    rows = [Row((1, 5, 6, 9), (7, 2)), Row((1, 8), (9, 10, 11, 12, 2))]
    ids, labels = torch.zeros(2, 7, dtype=torch.int64), torch.full((2, 7), -100)
    for i, row in enumerate(rows):
        told = torch.tensor((*row.prompt, *row.answer))
        ids[i, : len(told)], labels[i, len(row.prompt) : len(told)] = told, told[len(row.prompt) :]
    decoder = model.model
    with torch.no_grad():
        wanted = model(ids, labels=labels, attention_mask=torch.ones_like(ids)).loss
        found = answer_loss(base, collate(rows, torch.device("cpu")))
    torch.testing.assert_close(found, wanted)
    assert model.model is decoder


# ---- data that cannot be used


def test_a_row_that_is_too_long_is_named_with_its_file_and_line(tiny_base: BaseModel, tmp_path: Path) -> None:
    lines = [json.dumps({"input": "a" * (4 if i != 5 else 400), "output": "b"}) for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(["", *lines]))
    rows = tuple(read_examples(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match=r"train\.jsonl:7: input='a+\.*.*: the example has \d+ tokens, max_tokens=40"):
        add_task(
            Repertoire(tmp_path / "rep"),
            tiny_base,
            TaskData("one", rows, rows),
            dataclasses.replace(CONFIG, max_tokens=40),
        )


def test_nothing_is_written_where_no_folder_is_given(tiny_base: BaseModel, tmp_path: Path) -> None:
    old = Path.cwd()
    os.chdir(tmp_path)
    try:
        new = fresh_experts(tiny_base, [2], CONFIG, seed_name="x")
        ffns = new_mixture(tiny_base, [], new, name="x", first_layer=2, config=CONFIG)
        train_mixture(tiny_base, ffns, ROWS, name="x", config=CONFIG)
    finally:
        os.chdir(old)
    assert list(tmp_path.iterdir()) == []
