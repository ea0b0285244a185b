"""`greenroom doctor`: what works on this machine, and what given budgets can hold.

It knows nothing of how anything is found out (`greenroom.cli.doctor_checks`, `greenroom.cli.capacity`).
Read first: it changes nothing, but for compiling the native step into the cache; exit code 1 means that something
which was asked for cannot work.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from greenroom.cli import engine_flags as flags
from greenroom.cli.serve_config import DEFAULTS

_MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


def doctor(
    *,
    repertoire: Annotated[Path | None, typer.Option(help="Folder of a repertoire to look at.")] = None,
    base: flags.BaseFlag = None,
    expert_memory: flags.ExpertMemoryFlag = flags.DEFAULT_EXPERT_MEMORY,
    kv_memory: flags.KvMemoryFlag = flags.DEFAULT_KV_MEMORY,
    prefix_memory: flags.PrefixMemoryFlag = flags.DEFAULT_PREFIX_MEMORY,
    dtype: flags.DtypeFlag = flags.DEFAULT_DTYPE,
    host: Annotated[str, typer.Option(help="Address that would be bound.")] = DEFAULTS.server.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that would be bound.")] = DEFAULTS.server.port,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say what works on this machine, and what budgets can hold."""
    experts = flags.parse_size("expert_memory", expert_memory)
    kv = flags.parse_size("kv_memory", kv_memory)
    prefix = flags.parse_size("prefix_memory", prefix_memory, least=0)
    from greenroom.cli.capacity import capacity
    from greenroom.cli.doctor_checks import check_machine, check_port, check_repertoire
    from greenroom.cli.places import cache_folder
    from greenroom.cli.repertoire_view import print_json

    checks = [*check_machine(cache_folder()), check_port(host, port)]
    about, manifest, folder = check_repertoire(repertoire, base, cache_folder())
    checks += about
    holds = capacity(
        manifest,
        folder,
        expert_budget_bytes=experts,
        kv_budget_bytes=kv,
        prefix_budget_bytes=prefix,
        dtype=dtype,
    )
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "budgets": holds})
    else:
        for check in checks:
            typer.echo(f"{_MARKS[check.state]}  {check.name:<14}{check.text}")
        for name, value in holds.items():
            typer.echo(f"holds {name.replace('_', ' ')}: {value:,}")
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)
