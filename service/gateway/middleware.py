"""Pure ASGI middleware: the outer edge of every request, and the limit on its body."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from random import getrandbits
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Cancelled, TooLarge
from service.metrics import REFUSALS, GatewayMetrics

Handler = Callable[[Request], Awaitable[Response]]
TASKS = {"/generate": "generate", "/classify": "classify"}
DRAIN_S = 5.0
DRAIN_FACTOR = 4
_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


def outcome_of(status: int, code: str = "") -> str:
    """The metric label of an HTTP status and a problem's code: one of metrics.OUTCOMES."""
    if status < 400:
        return "ok"
    if code == Cancelled.code:
        return "cancelled"
    special = {429: "rejected", 503: "unavailable", 504: "expired"}
    return special.get(status, "bad_request" if status < 500 else "failed")


class Edge:
    """Gives every request an id and an arrival time, and counts it when it ends.

    Sets `request.state.request_id` and `.arrived` (time.monotonic()); a route that knows its model
    sets `.model`, `.queued` once the job is accepted, and the answer to an error its `.code`. The client's
    X-Request-Id is kept when it is 1-128 visible ASCII characters.
    An error that nothing inside has answered is answered by `respond`.
    """

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, respond: Callable[[Request, Exception], Response]
    ) -> None:
        self._app, self._metrics, self._respond = app, metrics, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"
        state["arrived"] = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await self._respond(Request(scope), error)(scope, receive, send_with_id)
        finally:
            if status and scope["method"] == "POST" and scope["path"] in TASKS:
                self._count(TASKS[scope["path"]], status, state)

    def _count(self, task: str, status: int, state: dict[str, Any]) -> None:
        model, code = state.get("model", "other"), state.get("code", "")
        self._metrics.requests.labels(task, model, outcome_of(status, code)).inc()
        self._metrics.duration.labels(task, model).observe(time.monotonic() - state["arrived"])
        if code in REFUSALS and "queued" not in state:
            self._metrics.refusals.labels(model, code).inc()


class Direct:
    """The busy routes, answered before the framework looks for them; it documents them, and has the others.

    A handler gets the request and returns its response; what it raises is left to the `Edge`.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app, self._handlers = app, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


class BodyLimit:
    """Reads the body before the app does and raises TooLarge beyond `limit` bytes.

    What follows a refused body is read and thrown away for a moment, because many clients only look
    at the answer once they have sent everything; one that asked first (Expect) is answered at once.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:18]) > self._limit:
            if "expect" not in headers:
                await self._drain(receive)
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                if more:
                    await self._drain(receive)
                raise self._too_large()
        await self._app(scope, _replay(bytes(body), receive), send)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request body is above the limit of {self._limit} bytes")

    async def _drain(self, receive: Receive) -> None:
        seen, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while more and seen <= DRAIN_FACTOR * self._limit:
                    message = await receive()
                    seen += len(message.get("body", b""))
                    more = message.get("more_body", False)


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
