"""`greenroom ask`: prompts to a running server, all at once, and what came back.

It knows nothing of models or of the wire; it is an application of `greenroom.AsyncClient`.
Read first: answers are printed in the order of the prompts; a prompt that fails costs its line and the exit code, not
the other answers.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from greenroom.channel import DEFAULT_TIMEOUT_S
from greenroom.cli.answer_view import Outcome, print_json, print_outcome, print_summary
from greenroom.cli.error_line import exit_code
from greenroom.client import AsyncClient
from greenroom.client_errors import GreenroomClientError
from greenroom.options import GenerateOptions, Prompt
from greenroom.results import Answer, Delta, StreamEvent
from greenroom.wire import answer
from runtime.errors import InvalidInputError

Show = Callable[[str, Outcome], None]


def ask(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts; several are sent at the same time.")],
    *,
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    task: Annotated[str | None, typer.Option(help="Pin this task instead of letting the locator decide.")] = None,
    task_weight: Annotated[
        list[str] | None, typer.Option(help="TASK=NUMBER; these tasks answer together; may be repeated.")
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Answer with the plain base model.")] = False,
    abstain_fails: Annotated[bool, typer.Option("--abstain-fails", help="No answer where no task is near.")] = False,
    default_task: Annotated[str | None, typer.Option(help="The task that answers where none is near.")] = None,
    group_bias: Annotated[
        list[str] | None, typer.Option(help="GROUP=NUMBER, added to the group's logit; may be repeated.")
    ] = None,
    group_mask: Annotated[list[str] | None, typer.Option(help="A group without weight; may be repeated.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Weights of experts per layer; see --json.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    priority: Annotated[int, typer.Option(help="Lower goes first, -100 to 100.")] = 0,
    tenant: Annotated[str, typer.Option(help="In whose name.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Prompts are whole prompts; no template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most. By default: the server's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. By default: the server's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Smallest set of tokens whose probabilities reach it.")] = None,
    top_k: Annotated[int | None, typer.Option(help="So many likeliest tokens; 0 is all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Tokens at least this fraction as likely as the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Against tokens there were; 1 is off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Against tokens of the answer, once.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Against tokens of the answer, each time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    n: Annotated[int | None, typer.Option(help="Answers to each prompt. By default: one.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities, so many alternatives; see --json.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that answers follow.", exists=True, dir_okay=False)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that answers match.")] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print as tokens come. By default: if one prompt, without --json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line.")] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for each prompt.")] = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running server."""
    single = len(prompts) == 1 and n in {None, 1} and not as_json
    if stream and not single:
        raise InvalidInputError("stream", stream, "takes a single prompt and one answer, and no --json")
    options: GenerateOptions = {
        "task": task,
        "task_weights": dict(_number("task-weight", "TASK", text) for text in task_weight or ()),
        "base_only": base_only,
        "abstain_fails": abstain_fails,
        "default_task": default_task,
        "group_bias": dict(_number("group-bias", "GROUP", text) for text in group_bias or ()),
        "group_mask": group_mask or (),
        "explain": explain,
        "priority": priority,
        "tenant": tenant,
        "raw": raw,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or (),
        "n": n,
        "logprobs": logprobs,
        "json_schema": json_schema.read_text() if json_schema else None,
        "regex": regex,
    }
    streaming = single if stream is None else stream
    show = print_json if as_json else print_outcome
    asked = [(prompt, _with_system(system, prompt)) for prompt in prompts]
    outcomes = asyncio.run(_ask_all(server, timeout, asked, options, None if streaming else show))
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    if answers and not as_json:
        print_summary(answers)
    failures = [outcome for outcome in outcomes if isinstance(outcome, GreenroomClientError)]
    if failures:
        raise typer.Exit(exit_code(failures[0]))


def _number(flag: str, what: str, text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise InvalidInputError(flag, text, f"is {what}=NUMBER") from error


def _with_system(system: str | None, prompt: str) -> Prompt:
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


async def _ask_all(
    server: str, timeout_s: float, asked: list[tuple[str, Prompt]], options: GenerateOptions, show: Show | None
) -> list[Outcome]:
    """Every prompt's outcome, in order; each is shown as soon as it and those before it are there."""
    async with AsyncClient(server, timeout_s=timeout_s) as client:
        if show is None:
            return [await _streamed(client, *asked[0], options)]
        tasks = [asyncio.create_task(_outcome(client.generate(prompt, **options))) for _, prompt in asked]
        for (shown, _), task in zip(asked, tasks, strict=True):
            show(shown, await task)
        return [task.result() for task in tasks]


async def _outcome(answering: Coroutine[Any, Any, Answer]) -> Outcome:
    try:
        return await answering
    except GreenroomClientError as error:
        return error


async def _streamed(client: AsyncClient, shown: str, prompt: Prompt, options: GenerateOptions) -> Outcome:
    """One prompt's outcome, printed while it comes."""
    events: list[StreamEvent] = []
    try:
        async with aclosing(client.stream(prompt, **options)) as stream:
            async for event in stream:
                events.append(event)
                if isinstance(event, Delta):
                    typer.echo(event.text, nl=False)
        typer.echo()
        return answer(events)
    except GreenroomClientError as error:
        print_outcome(shown, error)
        return error
