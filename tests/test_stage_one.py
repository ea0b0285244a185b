"""Stage one of AT-MoE by other means: experts that PEFT trained are imported, grouped, mixed and controlled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.model.base import BaseModel
from runtime.model.generation import base_ref
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from training.adopt import adopt
from training.batches import collate, encode_row
from training.compose import compose
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.peft_adapter import read_adapter
from training.router_options import RouterOptions

GROUPS = {"letters": ["upper", "lower"], "digits": ["number"]}
CONFIG = TrainingConfig(epochs=4, batch_size=4, router_learning_rate=3e-2, locator_steps=5)
ROWS = {"upper": ("A", "u"), "lower": ("a", "l"), "number": ("7", "n")}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")


def train_with_peft(base: BaseModel, folder: Path, letter: str, answer: str) -> list[float]:
    """A LoRA of the FFN, trained for a few steps by PEFT and a plain loop; returns the losses."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(copy.deepcopy(base.model), config)
    template = default_template(base)
    batch = collate(
        [encode_row(base, template, letter * i, answer, max_tokens=64) for i in (3, 4, 5)], torch.device("cpu")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        logits = model(input_ids=batch.ids).logits[batch.predicts]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    return losses


def test_experts_that_peft_trained_are_mixed_by_named_groups(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    workshop = Workshop(tiny_base, Repertoire(tmp_path / "repertoire"), first_layer=0)
    for name, (letter, answer) in ROWS.items():
        losses = train_with_peft(tiny_base, tmp_path / name, letter, answer)
        assert losses[-1] < losses[0]
        adapter = read_adapter(tmp_path / name, base_ref(tiny_base.info))
        adopt(workshop.repertoire, tiny_base, adapter, name=name, samples=(), config=CONFIG)
    rows = tuple(
        Example(f"{letter * i} 7", f"{answer} n") for i in (3, 4, 5, 6) for letter, answer in list(ROWS.values())[:2]
    )
    data = TaskData("both", rows, rows)
    compose(workshop.repertoire, tiny_base, data, groups=GROUPS, options=RouterOptions(), config=CONFIG)
    engine = make_engine(workshop)
    free = ask(engine, "AAA 7", task="both", max_tokens=2, explain=True).wait()
    held = ask(engine, "AAA 7", task="both", max_tokens=2, explain=True, group_mask=frozenset({"letters"})).wait()
    for layer in free.finished.explanation:
        assert set(layer.groups) == {"letters", "digits"}
        assert sum(layer.groups.values()) == pytest.approx(1.0, abs=0.05)
    for layer in held.finished.explanation:
        assert layer.groups.get("letters", 0.0) == 0.0
        assert layer.groups["digits"] == pytest.approx(1.0)
