"""The routes of the HTTP front end.

It knows nothing of ports.
Read first: what asks the engine for something runs through the layers, tokens and quotas among them; health,
readiness and the empty page do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from runtime.errors import InvalidInputError, NotFoundError
from runtime.service.http_calls import HttpCalls
from runtime.service.http_failures import error_object
from runtime.service.metrics import CONTENT_TYPE
from runtime.service.openai_body import ChatBody, CompletionBody
from runtime.service.openai_calls import OpenAICalls
from runtime.service.page import page_response
from runtime.service.page_status import page_status

MAX_BODY_BYTES = 16 * 1024 * 1024

if TYPE_CHECKING:
    from pydantic import BaseModel

    from runtime.engine.engine import Engine
    from runtime.service.answers import Answers
    from runtime.service.guard import Guard
    from runtime.service.http_exchange import Exchange
    from runtime.service.models import Models

    Status = Callable[[], Awaitable[dict[str, Any]]]


def app_over(engine: Engine, models: Models, answers: Answers, guard: Guard, *, max_body_bytes: int) -> FastAPI:
    """The application that one engine answers.

    Args:
        engine: tells the page of itself.
        models: that may be named.
        answers: over the engine.
        guard: surrounds what asks the engine for something.
        max_body_bytes: a longer request is refused.
    """
    calls = HttpCalls(guard, max_body_bytes=max_body_bytes)
    status = partial(page_status, engine, models, answers)
    return make_app(calls, OpenAICalls(answers, models), models, guard, status)


def make_app(calls: HttpCalls, openai: OpenAICalls, models: Models, guard: Guard, status: Status) -> FastAPI:
    """The application.

    Args:
        calls: runs requests through the layers.
        openai: answers them.
        models: say whether requests are taken.
        guard: has the metrics.
        status: what the page shows.
    """
    app = FastAPI(title="Greenroom", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _no_route)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Show the page, which asks for everything else."""
        return page_response()

    @app.get("/status")
    async def show_status() -> Response:
        """Say who is resident where and what runs."""

        async def tell(exchange: Exchange) -> None:
            exchange.reply_json(await status())

        return calls.respond("Status", tell)

    @app.get("/health")
    async def health() -> Response:
        """Say that the process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether requests are taken."""
        taken = models.is_ready()
        return JSONResponse({"ready": taken}, status_code=200 if taken else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Everything that Prometheus is told."""

        async def expose(exchange: Exchange) -> None:
            exchange.reply(await asyncio.to_thread(guard.metrics.exposition), media_type=CONTENT_TYPE)

        return calls.respond("Metrics", expose)

    _add_openai(app, calls, openai)
    return app


def _add_openai(app: FastAPI, calls: HttpCalls, openai: OpenAICalls) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        """List the models that take requests."""
        return calls.respond("ListModels", openai.list_models)

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        """Tell of one model."""
        return calls.respond("Model", lambda exchange: openai.model(exchange, name))

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody))
    async def completions() -> Response:
        """Go on with a prompt."""
        return calls.respond("Completions", openai.completions)

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody))
    async def chat() -> Response:
        """Answer a message."""
        return calls.respond("ChatCompletions", openai.chat)


def _takes(body: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        known: Exception = InvalidInputError("method", request.method, "is not what this path takes")
    else:
        known = NotFoundError(f"no such path: {request.url.path[:200]}")
    _, body = error_object(known)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
