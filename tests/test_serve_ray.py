"""`greenroom serve --ray` before anything starts: what it takes, what it refuses, and how it is ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from greenroom.cli.main import app
from greenroom.cli.serve_config import load_config
from greenroom.cli.serve_ray import check_settings, signalled
from runtime.errors import InvalidInputError

REFUSED: dict[str, Any] = {
    "server.host": "0.0.0.0",
    "server.name": "x",
    "server.grace": 3.0,
    "server.max_message": "1MiB",
    "server.coalesce": 0.5,
    "server.max_calls": 3,
    "server.tokens": "tokens.toml",
    "server.admin": True,
    "server.signing_key": "key",
    "tls.certificate": "cert.pem",
    "tls.key": "key.pem",
    "tls.client_ca": "ca.pem",
    "metrics.host": "0.0.0.0",
    "metrics.port": 9090,
    "log.format": "json",
    "log.level": "debug",
    "traces.endpoint": "http://localhost:4317",
}


def written(folder: Path, tables: dict[str, dict[str, Any]]) -> Path:
    import json

    lines = ['repertoire = "r"']
    for section, values in tables.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "serve.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_port_of_ray_serve_does_not_do_is_refused(name: str, tmp_path: Path) -> None:
    section, key = name.split(".")
    chosen = load_config(written(tmp_path, {section: {key: REFUSED[name]}, "ray": {"enabled": True}}), {})
    with pytest.raises(InvalidInputError, match=rf"^{section}\.{key}=.* cannot be had with --ray"):
        check_settings(chosen)


def test_every_setting_is_either_refused_or_used_on_ray() -> None:
    used = {"server.port", "server.follow", "server.ready_file", "http.host", "http.port"}
    sections = load_config(None, {"repertoire": Path("r")}).model_dump(exclude={"repertoire", "trust", "engine", "ray"})
    assert {f"{section}.{key}" for section, values in sections.items() for key in values} == used | set(REFUSED)


def test_the_port_must_be_chosen() -> None:
    with pytest.raises(InvalidInputError, match=r"server\.port=0"):
        check_settings(load_config(None, {"repertoire": Path("r"), "port": 0, "ray_enabled": True}))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"ray_target_ongoing_requests": 4.0}, r"ray\.max_replicas=None: is needed by ray\.target_ongoing_requests"),
        ({"ray_min_replicas": 3, "ray_max_replicas": 2}, r"ray\.max_replicas=2"),
        ({"ray_max_replicas": 2, "ray_replicas": 5}, r"ray\.replicas=5: excludes scaling"),
    ],
)
def test_scaling_that_cannot_be_is_refused_by_name(given: dict[str, Any], problem: str) -> None:
    chosen = load_config(None, {"repertoire": Path("r"), "ray_enabled": True, **given})
    with pytest.raises(InvalidInputError, match=problem):
        chosen.ray.autoscaling()


def test_scaling_goes_to_ray_serve_under_its_own_names() -> None:
    given = {"ray_min_replicas": 0, "ray_max_replicas": 4, "ray_upscale_delay_s": 1.5}
    chosen = load_config(None, {"repertoire": Path("r"), "ray_enabled": True, **given})
    assert chosen.ray.autoscaling() == {"min_replicas": 0, "max_replicas": 4, "upscale_delay_s": 1.5}
    assert load_config(None, {"repertoire": Path("r"), "ray_enabled": True}).ray.autoscaling() == {}


def test_a_flag_of_ray_without_ray_is_refused(tmp_path: Path) -> None:
    serve = CliRunner().invoke(app, ["serve", "--repertoire", str(tmp_path), "--ray-replicas", "3"])
    assert (serve.exit_code, "ray.replicas=3: needs --ray" in serve.stderr) == (2, True)
    batch = ["batch", "in.jsonl", "out.jsonl", "--repertoire", str(tmp_path), "--ray-workers", "3"]
    told = CliRunner().invoke(app, batch)
    assert (told.exit_code, "ray=False: is needed by the other --ray flags" in told.stderr) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_and_what_was_there_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signalled() as ending:
        assert not ending.is_set()
        os.kill(os.getpid(), number)
        assert ending.wait(10)
    assert signal.getsignal(number) is before
