"""`greenroom token`: make bearer tokens.

It knows nothing of servers; `greenroom serve --tokens FILE` reads what is printed here.
Read first: the secret is shown once and stored nowhere; the file holds its digest.
"""

from typing import Annotated

import typer

from greenroom.cli.serve_config import toml_line

app = typer.Typer(help="Make bearer tokens for a server.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Make bearer tokens for a server."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What it is called in logs.")],
    *,
    scope: Annotated[list[str] | None, typer.Option(help="infer or admin; may be given twice.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose quota it uses. By default: its own.")] = None,
) -> None:
    """Print an entry for the file of tokens on stdout, and the secret on stderr."""
    from pydantic import ValidationError

    from runtime.errors import InvalidInputError
    from runtime.service.tokens import TokenEntry, digest_of, new_secret

    secret = new_secret()
    fields = {"name": name, "sha256": digest_of(secret), "scopes": scope or ["infer"], "tenant": tenant}
    try:
        entry = TokenEntry.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInputError(str(first["loc"][0]), first["input"], first["msg"]) from error
    lines = [toml_line(key, value) for key, value in entry.model_dump(exclude_none=True).items()]
    typer.echo("\n".join(["[[token]]", *lines]))
    typer.echo(f"secret: {secret}", err=True)
