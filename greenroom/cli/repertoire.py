"""`greenroom repertoire`: what a repertoire holds, whether it is whole, and moving it through time and space.

It does not know how any of it is done (`runtime.model`), nor how it looks (`greenroom.cli.repertoire_view`).
Read first: every command works on a folder that may be served at the same moment; nothing here stops a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

app = typer.Typer(help="List, check, clean, copy and roll back a repertoire.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--repertoire", help="Folder of the repertoire.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Trust = Annotated[
    Path | None, typer.Option(help="Public key in PEM, or folder of *.pem: refuse what none of them signed.")
]
Key = Annotated[Path | None, typer.Option(help="Private key (ed25519, PEM): sign the new manifest with it.")]


@app.command("list")
def list_(repertoire: Folder, *, as_json: Json = False) -> None:
    """List the generations that are here."""
    from greenroom.cli.repertoire_view import print_json, print_list
    from runtime.model.inventory import list_generations
    from runtime.model.repertoire import Repertoire

    store = Repertoire(repertoire)
    rows = list_generations(store)
    print_json({"generations": rows}) if as_json else print_list(rows)


@app.command()
def show(
    repertoire: Folder,
    *,
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Show one generation: its tasks and their experts."""
    from greenroom.cli.repertoire_view import print_generation, print_json
    from runtime.model.inventory import describe_generation, list_tasks
    from runtime.model.repertoire import Repertoire

    store = Repertoire(repertoire)
    manifest = store.manifest(generation)
    row = describe_generation(store, manifest.generation, store.head())
    tasks = list_tasks(store, manifest.generation)
    if as_json:
        print_json({"generation": row, "base": manifest.base.model_dump(), "tasks": tasks})
    else:
        print_generation(row, manifest, tasks)


@app.command()
def diff(
    first: Annotated[int, typer.Argument(min=1, metavar="A", help="Number of a generation.")],
    second: Annotated[int, typer.Argument(min=1, metavar="B", help="Number of another.")],
    repertoire: Folder,
    *,
    as_json: Json = False,
) -> None:
    """Compare two generations: what B has that A has not, and the reverse."""
    from greenroom.cli.repertoire_view import print_difference, print_json
    from runtime.model.difference import compare
    from runtime.model.repertoire import Repertoire

    difference = compare(Repertoire(repertoire), first, second)
    print_json(difference) if as_json else print_difference(difference)


@app.command()
def verify(
    repertoire: Folder,
    *,
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All generations that are here.")] = False,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Read everything and report all that is wrong; exit code 1 if anything is."""
    from greenroom.cli.repertoire_view import print_audit, print_json
    from runtime.model.audit import audit
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import TrustPolicy

    store = Repertoire(repertoire, trust=TrustPolicy.load(trust) if trust else None)
    with store.hold_generation(generation) as number, _bar("verifying") as on_progress:
        found = audit(store, store.generations() if everything else [number], on_progress=on_progress)
    print_json(found) if as_json else print_audit(found)
    if found.faults:
        raise typer.Exit(1)


@app.command()
def gc(
    repertoire: Folder,
    *,
    keep: Annotated[int, typer.Option(min=1, help="Newest generations that stay.")] = 3,
    grace_s: Annotated[float, typer.Option(min=0, help="Leave temporary files alone for so long, seconds.")] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old generations, and blobs and leftovers that nothing needs."""
    from greenroom.cli.repertoire_view import print_collected, print_json
    from runtime.model.collect import collect
    from runtime.model.repertoire import Repertoire

    done = collect(Repertoire(repertoire), keep=keep, grace_s=grace_s, dry_run=dry_run)
    print_json(done) if as_json else print_collected(done, dry_run=dry_run)


@app.command()
def push(
    target: Annotated[str, typer.Argument(help="A folder, or an fsspec URL such as s3://bucket/name.")],
    repertoire: Folder,
    *,
    read_back: Annotated[bool, typer.Option(help="Check remote blobs by reading them again.")] = True,
) -> None:
    """Bring to a copy what it lacks; it must not have changes of its own."""
    from greenroom.cli.repertoire_view import print_transferred
    from runtime.model.repertoire import Repertoire
    from runtime.model.store import open_store
    from runtime.model.transfer import push as push_to

    with _bar("pushing") as on_progress:
        done = push_to(Repertoire(repertoire), open_store(target, read_back=read_back), on_progress=on_progress)
    print_transferred(done, target)


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A folder, or an fsspec URL such as s3://bucket/name.")],
    repertoire: Folder,
    *,
    trust: Trust = None,
) -> None:
    """Bring what a copy has and this repertoire lacks; it must not have changes of its own."""
    from greenroom.cli.repertoire_view import print_transferred
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import TrustPolicy
    from runtime.model.store import open_store
    from runtime.model.transfer import pull as pull_from

    store = Repertoire(repertoire, trust=TrustPolicy.load(trust) if trust else None)
    with _bar("pulling") as on_progress:
        done = pull_from(store, open_store(source), on_progress=on_progress)
    print_transferred(done, str(repertoire))


@app.command()
def rollback(
    repertoire: Folder,
    *,
    to: Annotated[int, typer.Option(min=1, help="The older generation.")],
    expected: Annotated[int | None, typer.Option(min=1, help="Fail unless this is the current generation.")] = None,
    key: Key = None,
) -> None:
    """Publish an older generation's content as a new generation."""
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer

    store = Repertoire(repertoire)
    current = store.manifest().generation if expected is None else expected
    manifest = store.rollback(expected=current, to=to, signer=Signer.load(key) if key else None)
    typer.echo(f"generation {manifest.generation} is current; it holds what generation {to} holds")


@app.command()
def remove(
    task: Annotated[str, typer.Argument(help="Name of the task.")],
    repertoire: Folder,
    *,
    keep_experts: Annotated[
        bool, typer.Option("--keep-experts", help="Where other tasks use its experts, let these stay without a task.")
    ] = False,
    key: Key = None,
) -> None:
    """Publish a generation without a task; all other tasks answer as before."""
    from runtime.model.removal import remove_task
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer

    signer = Signer.load(key) if key else None
    manifest = remove_task(Repertoire(repertoire), task, keep_experts=keep_experts, signer=signer)
    typer.echo(f"generation {manifest.generation}: {task} removed, {len(manifest.tasks)} tasks left")


@app.command()
def sign(
    repertoire: Folder,
    *,
    key: Annotated[Path, typer.Option(help="Private key (ed25519, PEM).")],
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
) -> None:
    """Sign a generation's manifest, and so everything that it names."""
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer

    store, signer = Repertoire(repertoire), Signer.load(key)
    with store.hold_generation(generation) as number:
        store.sign(number, signer)
    typer.echo(f"generation {number} is signed by {signer.key_id}")


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes on stderr, gone when the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
