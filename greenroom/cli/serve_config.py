"""What `greenroom serve` can be told, as one validated value: from a TOML file, from flags, or both.

It knows nothing of engines or servers: `greenroom.cli.serve` builds them of this.
Read first: a flag given on the command line overrides the file, and the file overrides the defaults, which stand here
or where `runtime` has them, once. Unknown keys are errors. Paths are as the process sees them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenroom.cli import engine_flags as flags
from greenroom.cli.ray_choice import RAY
from runtime.engine.options import Policy
from runtime.errors import InvalidInputError
from runtime.kernels.step_kinds import DeviceKind, GraphKind, StepKind, WeightKind
from runtime.memory.eviction import EvictionName
from runtime.service.models import DEFAULT_NAME

Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSection(_Section):
    """The engine; the names are those of the flags, and of `flags.collect`."""

    base: str | None = None
    dtype: WeightKind = flags.DEFAULT_DTYPE
    step: StepKind = flags.DEFAULT_STEP
    device: DeviceKind = flags.DEFAULT_DEVICE
    cuda_graphs: GraphKind = flags.DEFAULT_GRAPHS
    threads: Annotated[int, Field(ge=0)] = flags.DEFAULT_THREADS
    expert_memory: str = flags.DEFAULT_EXPERT_MEMORY
    device_memory: str = flags.DEFAULT_DEVICE_MEMORY
    tenant_floors: str = flags.DEFAULT_TENANT_FLOORS
    max_rank: Annotated[int, Field(ge=1)] = flags.LIMITS.max_rank
    loaders: Annotated[int, Field(ge=1)] = flags.LIMITS.num_loaders
    kv_memory: str = flags.DEFAULT_KV_MEMORY
    prefix_memory: str = flags.DEFAULT_PREFIX_MEMORY
    max_running: Annotated[int, Field(ge=1)] = flags.LIMITS.max_running
    policy: Policy = flags.LIMITS.policy
    eviction: EvictionName = flags.LIMITS.eviction
    prefetch: bool = flags.LIMITS.prefetch
    max_draft: Annotated[int, Field(ge=0)] = flags.LIMITS.max_draft


class ServerSection(_Section):
    """The port, its bounds, and who may use it."""

    host: str = "127.0.0.1"
    port: Port = 50051
    name: str = DEFAULT_NAME
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0
    follow: Annotated[float, Field(ge=0)] = 2.0
    ready_file: Path | None = None
    max_message: str = "64MiB"
    coalesce: Annotated[float, Field(ge=0, le=1)] = 0.04
    max_calls: Annotated[int, Field(ge=1, le=100_000)] = 1024
    tokens: Path | None = None
    admin: bool = False
    signing_key: Path | None = None


class TlsSection(_Section):
    """PEM files; without a certificate the port talks in the clear."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


class MetricsSection(_Section):
    """Where Prometheus asks; without a port nowhere."""

    host: str = "127.0.0.1"
    port: Port | None = None


class HttpSection(_Section):
    """The OpenAI-compatible front end and the page; without a port there is none."""

    host: str = "127.0.0.1"
    port: Port | None = None


class RaySection(_Section):
    """Many replicas on a Ray cluster; see `runtime.scale.serve_app.ClusterOptions`."""

    enabled: bool = False
    address: str = RAY.address
    replicas: Annotated[int, Field(ge=1)] = RAY.num_workers
    gpus: Annotated[float, Field(ge=0)] = RAY.num_gpus
    min_replicas: Annotated[int, Field(ge=0)] | None = None
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    upscale_delay_s: Annotated[float, Field(ge=0)] | None = None
    downscale_delay_s: Annotated[float, Field(ge=0)] | None = None

    def autoscaling(self) -> dict[str, float]:
        """What was said of scaling, under Ray Serve's own names; nothing for a fixed number of replicas.

        Raises:
            InvalidInputError: numbers that exclude each other.
        """
        names = ("min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s", "downscale_delay_s")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if not found:
            return {}
        if self.max_replicas is None:
            raise InvalidInputError("ray.max_replicas", None, f"is needed by ray.{next(iter(found))}")
        if self.max_replicas < (self.min_replicas or 1):
            raise InvalidInputError("ray.max_replicas", self.max_replicas, "must be at least ray.min_replicas")
        if self.replicas != RAY.num_workers:
            raise InvalidInputError("ray.replicas", self.replicas, "excludes scaling")
        return found

    def check_enabled(self) -> None:
        """Refuse settings that nobody would read.

        Raises:
            InvalidInputError: naming one that needs `--ray`.
        """
        for name, value in ({} if self.enabled else self.model_dump(exclude_defaults=True)).items():
            raise InvalidInputError(f"ray.{name}", value, "needs --ray")


class LogSection(_Section):
    """How log lines look, and how much there is."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class TracesSection(_Section):
    """Where OpenTelemetry spans go (OTLP over gRPC, as in "http://localhost:4317"); without an endpoint nowhere."""

    endpoint: str | None = None


class ServeConfig(_Section):
    """Everything."""

    repertoire: Path
    trust: Path | None = None
    engine: EngineSection = EngineSection()
    server: ServerSection = ServerSection()
    tls: TlsSection = TlsSection()
    http: HttpSection = HttpSection()
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()
    traces: TracesSection = TracesSection()
    ray: RaySection = RaySection()

    def engine_flags(self) -> flags.EngineFlags:
        """What the engine is built from.

        Raises:
            InvalidInputError: a size or limit that cannot be used.
        """
        return flags.collect(repertoire=self.repertoire, trust=self.trust, **self.engine.model_dump())


DEFAULTS = ServeConfig(repertoire=Path())
SECTIONS: Mapping[str, type[_Section]] = {
    "engine": EngineSection,
    "server": ServerSection,
    "tls": TlsSection,
    "http": HttpSection,
    "metrics": MetricsSection,
    "log": LogSection,
    "traces": TracesSection,
    "ray": RaySection,
}


def load_config(file: Path | None, given: Mapping[str, Any]) -> ServeConfig:
    """The file, with what was given on the command line over it.

    Args:
        file: TOML; None for none.
        given: flag name -> value, only of flags that were typed.

    Raises:
        InvalidInputError: the file cannot be read, a key is unknown, or a value cannot be used.
    """
    tables = _read(file) if file is not None else {}
    for name, value in given.items():
        section, key = place_of(name)
        table = tables.setdefault(section, {}) if section else tables
        if isinstance(table, dict):
            table[key] = value
    try:
        return ServeConfig.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        shown = None if first["type"] == "missing" else first["input"]
        raise InvalidInputError(where, shown, first["msg"][:1].lower() + first["msg"][1:]) from error


def place_of(flag: str) -> tuple[str | None, str]:
    """Section and key of a flag: "metrics_port" is `port` in `[metrics]`, "host" is `host` in `[server]`."""
    section, _, key = flag.partition("_")
    if section in SECTIONS and key in SECTIONS[section].model_fields:
        return section, key
    return next((name for name in ("engine", "server") if flag in SECTIONS[name].model_fields), None), flag


def as_toml(config: ServeConfig) -> str:
    """The whole configuration as a file that says the same; what is unset stands there as a remark."""
    tables = config.model_dump(mode="json")
    lines = [toml_line(name, value) for name, value in tables.items() if name not in SECTIONS]
    for section in SECTIONS:
        lines += ["", f"[{section}]", *(toml_line(name, value) for name, value in tables[section].items())]
    return "\n".join(lines) + "\n"


def toml_line(name: str, value: object) -> str:
    """One key; a remark where it has no value."""
    # JSON's strings, numbers and booleans are TOML's too.
    return f"# {name} =" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError("config", str(file), f"cannot be read: {error}") from error
