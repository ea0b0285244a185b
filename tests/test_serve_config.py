"""The configuration of `greenroom serve`: a file, flags over it, and what goes with a server because of it."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from repertoires import Workshop
from scripted_engine import ScriptedEngine
from typer.main import get_command
from typer.testing import CliRunner, Result

import greenroom
from greenroom import Client, Tls
from greenroom.cli.main import app
from greenroom.cli.serve_config import DEFAULTS, SECTIONS, ServeConfig, as_toml, load_config, place_of
from greenroom.cli.serve_parts import logging_as, serving_metrics, tls_files, tracing_as
from runtime.errors import InvalidInputError
from runtime.service.logs import JsonLines
from runtime.service.metrics import Metrics
from runtime.service.metrics_port import metrics_port
from runtime.service.tokens import Tokens

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def test_the_file_overrides_the_defaults_and_flags_override_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, 'repertoire = "r"\n[server]\nport = 7\ngrace = 3.0\n[engine]\nmax_running = 2\n')
    result = run("serve", "--config", str(file), "--port", "9", "--metrics-port", "0", "--print-config")
    assert result.exit_code == 0, result.stderr
    shown = ServeConfig.model_validate(tomllib.loads(result.stdout))
    assert (shown.repertoire, shown.server.port, shown.server.grace) == (Path("r"), 9, 3.0)
    assert (shown.engine.max_running, shown.engine.policy) == (2, DEFAULTS.engine.policy)
    assert shown.metrics.port == 0


def test_a_flag_that_repeats_the_default_overrides_the_file_too(tmp_path: Path) -> None:
    file = written(tmp_path, 'repertoire = "r"\n[server]\nport = 7\n')
    result = run("serve", "--config", str(file), "--port", str(DEFAULTS.server.port), "--print-config")
    assert tomllib.loads(result.stdout)["server"]["port"] == DEFAULTS.server.port


def test_what_is_printed_says_the_same_when_it_is_read() -> None:
    config = load_config(None, {"repertoire": Path('a "b" \\ ü'), "tokens": Path("t"), "metrics_port": 1, "base": "x"})
    assert ServeConfig.model_validate(tomllib.loads(as_toml(config))) == config
    assert ServeConfig.model_validate(tomllib.loads(as_toml(DEFAULTS))) == DEFAULTS


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "repertoire"),
        ('repertoire = "r"\nports = 1', "ports"),
        ('repertoire = "r"\n[server]\nprot = 1', "server.prot"),
        ('repertoire = "r"\n[server]\nport = 70000', "server.port"),
        ('repertoire = "r"\n[engine]\npolicy = "best"', "engine.policy"),
        ('repertoire = "r"\n[log]\nformat = "xml"', "log.format"),
        ('repertoire = "r"\nserver = 1', "server"),
        ("repertoire = ", "config"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_key(tmp_path: Path, text: str, field: str) -> None:
    result = run("serve", "--config", str(written(tmp_path, text)), "--print-config")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"greenroom: {field}=")


def test_whether_steps_are_recorded_reaches_the_engine(tmp_path: Path) -> None:
    text = 'repertoire = "r"\n[engine]\ncuda_graphs = "off"'
    assert load_config(written(tmp_path, text), {}).engine_flags().cuda_graphs == "off"
    assert DEFAULTS.engine_flags().cuda_graphs == "auto"


def test_floors_ranks_loaders_and_the_device_budget_reach_the_engine(tmp_path: Path) -> None:
    chosen = 'tenant_floors = "gold=2MiB, tin=1000"\nmax_rank = 8\nloaders = 5\ndevice_memory = "3MiB"'
    text = f'repertoire = "r"\n[engine]\n{chosen}'
    limits = load_config(written(tmp_path, text), {}).engine_flags().limits
    assert dict(limits.tenant_floors) == {"gold": 2 << 20, "tin": 1000}
    assert (limits.max_rank, limits.num_loaders, limits.device_budget_bytes) == (8, 5, 3 << 20)
    assert not DEFAULTS.engine_flags().limits.tenant_floors


@pytest.mark.parametrize("floors", ["gold", "=1MiB", "gold=", "gold=1,gold=2", "gold=much"])
def test_floors_that_name_no_tenant_or_size_or_one_twice_are_refused(floors: str) -> None:
    config = load_config(None, {"repertoire": Path("r"), "tenant_floors": floors})
    with pytest.raises(InvalidInputError, match="tenant_floors"):
        config.engine_flags()


def test_floors_that_leave_nothing_of_the_budget_are_refused() -> None:
    config = load_config(None, {"repertoire": Path("r"), "tenant_floors": "gold=9MiB", "expert_memory": "9MiB"})
    with pytest.raises(InvalidInputError, match="must leave some of the expert budget"):
        config.engine_flags()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run("serve", "--config", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_every_flag_has_its_place_in_the_file_and_every_key_its_flag() -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    flags = {parameter.name for parameter in command.params} - {"config", "print_config", "help"}
    places = {place_of(flag) for flag in flags}
    keys = {(None, name) for name in ServeConfig.model_fields if name not in SECTIONS}
    keys |= {(section, key) for section, model in SECTIONS.items() for key in model.model_fields}
    assert places == keys


def test_the_flags_show_the_defaults_of_the_configuration() -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.name in {"config", "print_config", "help", "repertoire"}:
            continue
        section, key = place_of(parameter.name)
        part = DEFAULTS if section is None else getattr(DEFAULTS, section)
        assert parameter.default == getattr(part, key), parameter.name


# ---- what goes with a server


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics()
    made.watch_engine(ScriptedEngine().statistics)
    return made


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_have_a_port_of_their_own_and_nothing_else_is_there(metrics: Metrics) -> None:
    with metrics_port(metrics, host="127.0.0.1", port=0) as port:
        status, text = fetch(port, "/metrics")
        assert (status, "greenroom_running_sequences 0.0" in text) == (200, True)
        assert fetch(port, "/")[0] == 404
        with (
            pytest.raises(InvalidInputError, match=r"metrics\.port="),
            metrics_port(metrics, host="127.0.0.1", port=port),
        ):
            pass
    with pytest.raises(urllib.error.URLError):
        fetch(port, "/metrics")


def test_without_a_port_there_are_no_metrics(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    with serving_metrics(DEFAULTS.metrics, metrics):
        pass
    assert capsys.readouterr().out == ""


def test_tls_needs_both_certificate_and_key() -> None:
    assert tls_files(DEFAULTS.tls) is None
    for given in ({"tls_certificate": "c"}, {"tls_key": "k"}, {"tls_client_ca": "a"}):
        with pytest.raises(InvalidInputError, match=r"tls\."):
            tls_files(load_config(None, {"repertoire": "r", **given}).tls)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    outputs, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = outputs
    root.setLevel(level)


def test_logs_are_lines_of_text_or_of_json(root_logger: logging.Logger) -> None:
    logging_as(load_config(None, {"repertoire": "r", "log_level": "warning"}).log)
    assert root_logger.level == logging.WARNING
    assert not any(isinstance(output.formatter, JsonLines) for output in root_logger.handlers)
    logging_as(load_config(None, {"repertoire": "r", "log_format": "json"}).log)
    assert all(isinstance(output.formatter, JsonLines) for output in root_logger.handlers)


def test_without_an_endpoint_nothing_is_traced() -> None:
    with tracing_as(DEFAULTS.traces) as tracing:
        assert tracing is None
    with tracing_as(load_config(None, {"repertoire": "r", "traces_endpoint": "http://127.0.0.1:1"}).traces) as tracing:
        assert tracing is not None


def test_serving_imports_no_opentelemetry_unless_traces_are_configured() -> None:
    code = "import sys, greenroom.cli.serve_parts; print([name for name in sys.modules if 'opentelemetry' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- tokens


def test_a_new_token_is_shown_once_and_its_entry_lets_it_in(tmp_path: Path) -> None:
    result = run("token", "new", "front", "--scope", "infer", "--scope", "admin", "--tenant", "search")
    secret = result.stderr.strip().removeprefix("secret: ")
    assert secret not in result.stdout
    principal = Tokens.load(written(tmp_path, result.stdout)).principal(f"Bearer {secret}")
    assert (principal.name, principal.tenant, principal.scopes) == ("front", "search", {"infer", "admin"})


@pytest.mark.parametrize(("arguments", "field"), [(("no spaces",), "name"), (("x", "--scope", "all"), "scopes")])
def test_a_token_that_could_not_be_read_is_not_made(arguments: tuple[str, ...], field: str) -> None:
    result = run("token", "new", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"greenroom: {field}=")


# ---- all of it


def test_a_server_run_from_a_file_has_tls_tokens_metrics_and_json_logs(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path, prototypes: dict[str, str]
) -> None:
    authority = Authority()
    pair = authority.sign("server")
    made = run("token", "new", "front")
    secret = made.stderr.strip().removeprefix("secret: ")
    for name, data in {"c.pem": pair.certificate, "k.pem": pair.key, "tokens.toml": made.stdout.encode()}.items():
        (tmp_path / name).write_bytes(data)
    given = {
        "repertoire": three_tasks.repertoire.root,
        "base": str(tiny_base_folder),
        "port": 0,
        "threads": 1,
        "kv_memory": "8MiB",
        "max_running": 2,
        "tokens": tmp_path / "tokens.toml",
        "tls_certificate": tmp_path / "c.pem",
        "tls_key": tmp_path / "k.pem",
        "metrics_port": 0,
        "http_port": 0,
        "log_format": "json",
    }
    file = written(tmp_path, as_toml(load_config(None, given)))
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--config", str(file)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            metrics_at = process.stdout.readline().split()[-1]
            target = process.stdout.readline().split()[-1]
            front = process.stdout.readline().split()[-1]
            asked = urllib.request.Request(f"{front}/v1/models", headers={"authorization": f"Bearer {secret}"})
            trusting = ssl.create_default_context(cadata=authority.certificate.decode())
            with urllib.request.urlopen(asked, timeout=60, context=trusting) as answer:
                models = [model["id"] for model in json.load(answer)["data"]]
            assert models == ["greenroom", "greenroom:red", "greenroom:green", "greenroom:blue"]
            tls = Tls(roots=authority.certificate)
            with Client(target, tls=tls, token=secret, timeout_s=60.0) as client:
                assert client.generate(prototypes["red"], max_tokens=2, request_id="r1").routing.task == "red"
            with Client(target, tls=tls, timeout_s=60.0) as client, pytest.raises(greenroom.UnauthenticatedError):
                client.generate("x")
            port = int(metrics_at.removesuffix("/metrics").rpartition(":")[2])
            assert 'greenroom_located_total{how="located",task="red"} 1.0' in fetch(port, "/metrics")[1]
        finally:
            process.terminate()
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    access = [line for line in lines if line["logger"] == "greenroom.access" and line.get("request_id") == "r1"]
    assert [(line["code"], line["token"], line["tenant"]) for line in access] == [("OK", "front", "front")]
    assert process.returncode == 0
