"""`greenroom doctor`: what it finds on this machine, and what it says that budgets hold."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from engines import ask
from repertoires import Workshop
from typer.testing import CliRunner, Result

from greenroom.cli.capacity import expert_capacity, kv_capacity
from greenroom.cli.doctor_checks import check_port, check_repertoire
from greenroom.cli.main import app
from runtime.engine.engine import Engine
from runtime.engine.kv import KVCache, KVShape
from runtime.engine.prefix import BLOCK
from runtime.errors import BudgetError
from runtime.memory.visible import VisibleSets
from runtime.model.generation import open_generation
from runtime.model.routers import router_bytes


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_everything_is_said_of_a_machine_that_can_serve(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    arguments = ("--repertoire", str(three_tasks.repertoire.root), "--base", str(tiny_base_folder), "--port", "0")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    checks = {check["name"]: check for check in said["checks"]}
    assert {"python", "machine", "torch", "gpu", "native step", "onnxruntime", "port", "repertoire", "base"} <= set(
        checks
    )
    assert "CPUExecutionProvider" in checks["onnxruntime"]["text"]
    assert checks["repertoire"]["text"] == "generation 3, 3 tasks, base tiny"
    assert (said["budgets"]["expert_sets"], said["budgets"]["tasks_running_together"]) == (3, 3)
    assert said["budgets"]["kv_tokens"] > 0
    text = run(*arguments)
    assert "ok    repertoire" in text.stdout
    assert "holds kv tokens: " in text.stdout


def test_what_cannot_work_is_a_failure(three_tasks: Workshop, tmp_path: Path) -> None:
    checks, manifest, folder = check_repertoire(tmp_path / "none", None, tmp_path)
    assert ([(check.name, check.state) for check in checks], manifest, folder) == ([("repertoire", "fail")], None, None)
    checks, manifest, folder = check_repertoire(three_tasks.repertoire.root, "nowhere", tmp_path)
    assert [(check.name, check.state) for check in checks] == [("repertoire", "ok"), ("base", "fail")]
    assert manifest is not None
    assert folder is None


def test_a_base_that_the_repertoire_was_not_made_for_is_a_failure(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_base_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    checks, _, folder = check_repertoire(three_tasks.repertoire.root, str(other), tmp_path)
    assert (checks[-1].name, checks[-1].state, folder) == ("base", "fail", None)


def test_a_port_in_use_is_a_failure() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert check_port("127.0.0.1", port).state == "fail"
        assert run("--port", str(port)).exit_code == 1
    assert check_port("127.0.0.1", 0).state == "ok"


def test_tasks_run_together_as_long_as_their_visible_sets_fit(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    sizes = [sum(unit.bytes for unit in entry.units) for entry in manifest.experts]
    routers = [router_bytes(manifest, task) for task in manifest.tasks]
    whole = sum(sizes) + sum(routers)
    assert expert_capacity(manifest, whole, "float32")["tasks_running_together"] == 3
    # Blue sees all three sets, green two, red one.
    short = expert_capacity(manifest, sum(sizes) + routers[2] - 1, "float32")
    assert (short["tasks_too_large"], short["tasks_running_together"]) == (1, 2)
    assert expert_capacity(manifest, sizes[0] + routers[0], "float32") == {
        "expert_sets": 3,
        "all_experts_bytes": whole,
        "expert_sets_in_budget": 0,
        "tasks_running_together": 1,
        "tasks_too_large": 2,
    }


@pytest.mark.parametrize(("dtype", "kept"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_budget_of_all_experts_bytes_is_what_an_engine_of_that_dtype_has_in_memory_in_the_end(
    three_tasks: Workshop, dtype: Literal["float32", "bfloat16"], kept: torch.dtype
) -> None:
    generation = open_generation(three_tasks.repertoire)
    visible = VisibleSets(three_tasks.repertoire, max_rank=64, dtype=kept)
    wanted = {each.key: each.num_bytes for task in generation.mixtures for each in visible.of(generation, task).wanted}
    said = expert_capacity(generation.manifest, sum(wanted.values()), dtype)
    assert said["all_experts_bytes"] == sum(wanted.values())
    assert (said["tasks_running_together"], said["tasks_too_large"]) == (3, 0)


def test_the_cache_holds_as_many_tokens_as_it_is_said_to(tiny_base_folder: Path) -> None:
    found = kv_capacity(tiny_base_folder, 1 << 16, 0, "float32")
    shape = KVShape(num_layers=4, num_heads=2, head_width=16, context=512)
    cpu = torch.device("cpu")
    cache = KVCache(shape, num_slots=1, budget_bytes=1 << 16, dtype=torch.float32, device=cpu)
    cache.check_fits(found["kv_tokens"])
    with pytest.raises(BudgetError):
        cache.check_fits(found["kv_tokens"] + 1)


def test_the_prefix_cache_keeps_as_many_tokens_as_it_is_said_to(
    three_tasks: Workshop, tiny_base_folder: Path, make_engine: Callable[..., Engine]
) -> None:
    for budget in (0, 50_000, 200_000):
        said = kv_capacity(tiny_base_folder, 1 << 16, budget, "float32")["prefix_tokens"]
        if budget == 0:
            assert said == 0
            continue
        engine = make_engine(three_tasks, prefix_budget_bytes=budget)
        prompt = "x" * (said - 1)  # a token each, and at most one special token before them
        ask(engine, prompt, raw=True, base_only=True).wait()
        again = ask(engine, prompt, raw=True, base_only=True).wait()
        assert again.finished.usage.cached_tokens >= said - 2 * BLOCK
        assert engine.statistics().prefix_bytes <= budget


def test_a_flag_says_how_much_is_kept_of_prompts(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    arguments = ("--repertoire", str(three_tasks.repertoire.root), "--base", str(tiny_base_folder), "--port", "0")

    def tokens(*more: str) -> int:
        held: int = json.loads(run(*arguments, *more, "--json").stdout)["budgets"]["prefix_tokens"]
        return held

    assert tokens("--prefix-memory", "0B") == 0
    assert 0 < tokens("--prefix-memory", "1MiB") < tokens()


def test_bases_that_name_their_sizes_otherwise_are_understood(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    found = kv_capacity(tmp_path, 1 << 16, 0, "float32")
    assert found["kv_token_bytes"] == 2 * 3 * 32 * 4
