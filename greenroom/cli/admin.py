"""`greenroom admin`: what is in a running server's memory, what it serves, and changing both.

It knows nothing of the wire; it is an application of `greenroom.AdminClient`.
Read first: the token is read from a file or from GREENROOM_TOKEN, never from the command line, where others could see
it. `--ca` talks over TLS.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from greenroom.admin_client import AdminClient, TaskStatus
from greenroom.channel import Tls
from greenroom.cli.places import secret_token
from greenroom.client_errors import GreenroomClientError
from runtime.errors import InvalidInputError

app = typer.Typer(help="Administer a running server.", no_args_is_help=True)

Server = Annotated[str, typer.Option(help="HOST:PORT of the server.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the token; default: GREENROOM_TOKEN.")]
Ca = Annotated[Path | None, typer.Option(help="PEM: who signed the server's certificate; talks over TLS.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Name = Annotated[str, typer.Argument(help="Name of a task.")]
Expected = Annotated[int, typer.Option(min=1, help="The generation that is served; fails if it is not.")]
HERE = "127.0.0.1:50051"


@app.command()
def tasks(*, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None, as_json: Json = False) -> None:
    """List all tasks and where their experts are."""
    with _admin(server, token_file, ca) as admin:
        _show(admin.tasks(), as_json=as_json)


@app.command()
def task(
    name: Name, *, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None, as_json: Json = False
) -> None:
    """Show one task."""
    with _admin(server, token_file, ca) as admin:
        _show((admin.task(name),), as_json=as_json)


@app.command()
def prefetch(name: Name, *, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None) -> None:
    """Begin to read a task's experts."""
    with _admin(server, token_file, ca) as admin:
        _show((admin.prefetch(name),), as_json=False)


@app.command()
def pin(name: Name, *, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None) -> None:
    """Keep a task's experts in memory."""
    with _admin(server, token_file, ca) as admin:
        _show((admin.pin(name),), as_json=False)


@app.command()
def unpin(name: Name, *, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None) -> None:
    """Let go of a pinned task."""
    with _admin(server, token_file, ca) as admin:
        _show((admin.unpin(name),), as_json=False)


@app.command()
def evict(name: Name, *, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None) -> None:
    """Drop a task's own experts from memory where nobody holds them."""
    with _admin(server, token_file, ca) as admin:
        typer.echo(f"{admin.evict(name)} bytes are free again")


@app.command()
def publish(
    generation: Annotated[int, typer.Argument(min=1, help="The newest generation of the repertoire.")],
    *,
    expected: Expected,
    server: Server = HERE,
    token_file: TokenFile = None,
    ca: Ca = None,
) -> None:
    """Serve the newest generation now."""
    with _admin(server, token_file, ca) as admin:
        admin.publish(expected=expected, generation=generation)
    typer.echo(f"generation {generation} is served")


@app.command()
def rollback(
    *,
    to: Annotated[int, typer.Option(min=1, help="The older generation.")],
    expected: Expected,
    server: Server = HERE,
    token_file: TokenFile = None,
    ca: Ca = None,
) -> None:
    """Serve a new generation with the content of an older one."""
    with _admin(server, token_file, ca) as admin:
        number = admin.rollback(expected=expected, to=to)
    typer.echo(f"generation {number} is served; it holds what generation {to} holds")


@app.command()
def watch(*, server: Server = HERE, token_file: TokenFile = None, ca: Ca = None, as_json: Json = False) -> None:
    """Print what happens, until interrupted."""
    from greenroom.cli.repertoire_view import print_json

    with _admin(server, token_file, ca) as admin, closing(admin.watch()) as events:
        for event in events:
            about = event.generation if event.task is None else _line(event.task)
            print_json(asdict(event)) if as_json else typer.echo(f"{event.what}: {about}")


@contextmanager
def _admin(server: str, token_file: Path | None, ca: Path | None) -> Iterator[AdminClient]:
    try:
        token = token_file.read_text(encoding="utf-8").strip() if token_file is not None else secret_token()
        tls = Tls(roots=ca.read_bytes()) if ca is not None else None
    except OSError as error:
        raise InvalidInputError("token_file or ca", error.filename, f"cannot be read: {error.strerror}") from error
    with AdminClient(server, token=token, tls=tls) as admin:
        try:
            yield admin
        except GreenroomClientError as error:
            if error.code.name != "UNIMPLEMENTED":
                raise
            raise InvalidInputError("server", server, "has no administration: serve it with --admin") from error


def _show(tasks: tuple[TaskStatus, ...], *, as_json: bool) -> None:
    from greenroom.cli.repertoire_view import print_json

    if as_json:
        print_json({"tasks": [asdict(status) for status in tasks]})
        return
    for status in tasks:
        typer.echo(_line(status))


def _line(status: TaskStatus) -> str:
    words = [f"{status.task}: {status.units_ready} of {status.units} layers in memory"]
    words += [f"{status.resident_bytes} of {status.set_bytes} bytes", f"{status.references} references"]
    words += ["pinned"] if status.pinned else []
    words += [f"quarantined: {status.quarantine_reason}"] if status.quarantine_reason else []
    return ", ".join(words)
