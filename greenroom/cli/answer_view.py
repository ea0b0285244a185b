"""Answers as people and programs read them: text, a table of where experts came from, JSON lines.

It knows nothing of connections.
Read first: answers go to stdout, errors to stderr; text of models and users is never read as markup.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from greenroom.cli.error_line import error_line
from greenroom.client_errors import GreenroomClientError
from greenroom.results import Answer, ExpertUse, Routing

Outcome = Answer | GreenroomClientError


def print_outcome(prompt: str, outcome: Outcome) -> None:
    """The prompt and its answer, or one line about its error on stderr."""
    if isinstance(outcome, GreenroomClientError):
        typer.echo(f"greenroom: {error_line(outcome)}", err=True)
        return
    console = Console(highlight=False)
    console.print(Text(f"> {prompt}", style="dim"))
    for number, choice in enumerate(outcome.choices):
        if len(outcome.choices) > 1:
            console.print(Text(f"[{number}]", style="dim"))
        console.print(Text(choice.text))


def print_json(prompt: str, outcome: Outcome) -> None:
    """One JSON object in one line: `prompt`, and either what `Answer` holds or `error`."""
    if isinstance(outcome, Answer):
        first = {name: getattr(outcome, name) for name in ("text", "token_ids", "finish_reason")}
        fields = first | asdict(outcome)
        fields["usage"]["tokens_per_s"] = outcome.usage.tokens_per_s
    else:
        error = {"code": outcome.code.name, "reason": outcome.reason, "message": outcome.message}
        fields = {"error": error, "request_id": outcome.request_id}
    typer.echo(json.dumps({"prompt": prompt, **fields}, ensure_ascii=False))


def print_summary(answers: Sequence[Answer]) -> None:
    """A table with a row per answer: who answered and why, with which experts from where, and how fast."""
    table = Table("#", "task", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("how", "margin", "experts", "came from", "tok", "tok/s"):
        table.add_column(heading, no_wrap=True)
    for number, answer in enumerate(answers, start=1):
        routing, usage = answer.routing, answer.usage
        table.add_row(
            str(number),
            Text(routing.task or "\n".join(_shares(routing)) or "-"),
            routing.how,
            f"{routing.margin:.3g}",
            "\n".join(f"{use.digest[:8]} x{use.num_layers}" for use in routing.experts) or "-",
            "\n".join(_origin(use) for use in routing.experts) or "-",
            str(usage.completion_tokens),
            f"{usage.tokens_per_s:.1f}",
        )
    Console().print(table)


def _shares(routing: Routing) -> list[str]:
    return [f"{share:.3g} {task}" for task, share in routing.task_weights.items()]


def _origin(use: ExpertUse) -> str:
    """Where an expert set was, and what reading it took if it was on disk."""
    if use.source == "host":
        return "host"
    return f"disk {use.bytes_read / 2**20:.1f} MiB {1000 * use.load_s:.0f} ms"
