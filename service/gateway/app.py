"""The HTTP application. Only this module turns errors into HTTP (RFC 9457 problem+json)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from secrets import token_hex
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import BadRequest, NotAllowed, NotFound, OfframpError, TooLarge, Unavailable, by_code
from service.gateway.auth import Guard, described
from service.gateway.expiry import Expiry
from service.gateway.following import Crowd
from service.gateway.middleware import BodyLimit, Direct, Edge
from service.gateway.replies import Replies
from service.gateway.routes import classify, generate, health, jobs, models
from service.gateway.schemas import Problem, problem_of
from service.gateway.shedding import Flows, Lag, Shed
from service.gateway.state import Catalogue, Gateway
from service.gateway.webhooks import Webhooks
from service.keys import gateway_keyring
from service.metrics import GatewayMetrics

PROBLEM = "application/problem+json"
LOCAL_REDIS = "redis://127.0.0.1:6379/0"
RETRY_AFTER_S = {429: 1, 503: 5}
_BY_STATUS = {400: BadRequest, 404: NotFound, 405: NotAllowed, 413: TooLarge}
log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The gateway. Starts without Redis: /docs and /healthz answer, work is refused with 503.

    An empty `settings.redis_url` means a server on this machine's usual port. Whoever serves the app sets
    `state.leaving`, a function that says whether it is stopping: answers that last (events, long polls) end then.
    """
    app = FastAPI(
        title="Offramp",
        version=version("offramp"),
        description=_description(),
        lifespan=_lifespan,
        responses={"default": {"description": "A problem", "content": {PROBLEM: {"schema": _problem_schema()}}}},
    )
    gateway_id = f"{socket.gethostname()}-{os.getpid()}-{token_hex(2)}"
    broker = Broker(settings.redis_url or LOCAL_REDIS)
    replies, metrics, catalogue = Replies(broker, gateway_id), GatewayMetrics(), Catalogue(broker)
    keyring = gateway_keyring(settings)
    app.state.gateway = Gateway(gateway_id, settings, broker, replies, catalogue, metrics, keyring, Flows())
    app.state.webhooks = Webhooks(broker, metrics, settings)
    app.state.expiry = Expiry(broker, settings)
    app.state.crowd = Crowd()
    lag = app.state.lag = Lag()
    app.state.leaving = lambda: False
    app.add_middleware(Direct, handlers={"/generate": generate.generate, "/classify": classify.classify})
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Guard, keys=keyring, broker=broker)
    app.add_middleware(Shed, lag=lag)
    app.add_middleware(Edge, metrics=metrics, respond=problem)
    for route in (generate, classify, jobs, models, health):
        app.include_router(route.router)
    for kind in (OfframpError, RequestValidationError, HTTPException, RedisError):
        app.add_exception_handler(kind, _on_error)
    page = app.openapi
    app.openapi = lambda: described(page())  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    try:
        async with gateway.replies, app.state.webhooks, app.state.expiry, app.state.lag:
            yield
    finally:
        await gateway.broker.aclose()


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return problem(request, error)


def problem(request: Request, error: Exception) -> JSONResponse:
    """The problem+json answer for any exception; an unexpected one is logged and says nothing of itself."""
    known, errors = _classify(error)
    request_id, request.state.code = request.state.request_id, known.code
    if known.status >= 500 and not known.retryable:
        log.error("request %s failed", request_id, exc_info=error)
    retry_after = known.retry_after_s or RETRY_AFTER_S.get(known.status)
    body = problem_of(known, request.url.path, request_id).model_copy(
        update={"retry_after_s": retry_after, "errors": errors or None}
    )
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if retry_after:
        headers["Retry-After"] = str(retry_after)
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body.model_dump(exclude_none=True), known.status, headers, media_type=PROBLEM)


def _classify(error: Exception) -> tuple[OfframpError, list[dict[str, str]]]:
    match error:
        case OfframpError():
            return error, []
        case RequestValidationError():
            errors = [{"field": _field(e["loc"]), "message": e["msg"]} for e in error.errors()]
            return BadRequest(_detail(errors[0]), field=errors[0]["field"] or None), errors
        case RedisError():
            return Unavailable("Redis cannot be reached"), []
        case HTTPException():
            return _BY_STATUS.get(error.status_code, OfframpError)(str(error.detail)), []
        case _:
            return OfframpError("something broke; the log has it under this request_id"), []


def _field(loc: Sequence[Any]) -> str:
    """`steps`, `images.3`: the location without what pydantic adds for members of a union."""
    parts = [part for part in loc if part not in ("body", "query", "path")]
    return ".".join(str(part) for i, part in enumerate(parts) if i == 0 or isinstance(part, int))


def _detail(error: dict[str, str]) -> str:
    return f"{error['field']}: {error['message']}" if error["field"] else error["message"]


def _description() -> str:
    rows = [f"| {kind.status} | `{code}` | {kind.__doc__} |" for code, kind in sorted(by_code().items())]
    return "Inference that knows when to stop.\n\n| status | code | meaning |\n|---|---|---|\n" + "\n".join(rows)


def _problem_schema() -> dict[str, Any]:
    return Problem.model_json_schema()
