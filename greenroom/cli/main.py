"""The command `greenroom`: subcommands, and the one place where an error becomes a line on stderr.

It knows nothing of what the subcommands do.
Read first: modules of subcommands import torch only inside their functions, so that `greenroom --help` is instant.
"""

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from greenroom.cli.admin import app as admin
from greenroom.cli.adopt import app as adopt
from greenroom.cli.ask import ask
from greenroom.cli.base import app as base
from greenroom.cli.batch import batch
from greenroom.cli.demo import demo
from greenroom.cli.doctor import doctor
from greenroom.cli.error_line import error_line, exit_code
from greenroom.cli.evaluate import evaluate
from greenroom.cli.export import export
from greenroom.cli.locate import locate
from greenroom.cli.repertoire import app as repertoire
from greenroom.cli.serve import serve
from greenroom.cli.token import app as token
from greenroom.cli.train import train
from greenroom.cli.train_router import train_router


class OneLineErrors(TyperGroup):
    """Runs a subcommand; an exception becomes one line and an exit code, unless `--debug` was given."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401 - as the base class has it
        """Invoke the subcommand."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"greenroom: {error_line(error)}", err=True)
            raise typer.Exit(exit_code(error)) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve routed mixtures of LoRA experts over one frozen base model.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every subcommand; `OneLineErrors` reads them."""


app.add_typer(base, name="base")
app.add_typer(adopt, name="import")
app.add_typer(repertoire, name="repertoire")
app.add_typer(token, name="token")
app.add_typer(admin, name="admin")
for command in (train, train_router, evaluate, export, locate, serve, ask, batch, demo, doctor):
    app.command()(command)


def run() -> None:
    """Entry point of the console script."""
    # Threads that wait for one another spin for some microseconds, then sleep. Sleeping at once slows every step down;
    # spinning for milliseconds, the default, is worse still where the cores are shared with anything else. OpenMP reads
    # this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    app(prog_name="greenroom")


if __name__ == "__main__":
    run()
