"""Who asks: the API key of a request, recognised before anything else of it is read, and held to its rate."""

from __future__ import annotations

from typing import Any, cast

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.broker.redis_streams import Broker
from service.errors import Unauthorized
from service.keys import Caller, Keyring

ANYBODY = Caller()
OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the gateway has any."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same, as a header."},
}


class Guard:
    """ASGI middleware: sets `request.state.caller` on every path that is not `OPEN`.

    Whoever the request's key stands for; anybody, without limits, where no keys are configured. Raises Unauthorized
    without a key, or with an unknown or expired one, and RateLimited when the key asks too often.
    """

    def __init__(self, app: ASGIApp, keys: Keyring, broker: Broker) -> None:
        self._app, self._keys, self._broker = app, keys, broker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            asked = self._keys.configured and scope["path"] not in OPEN
            scope["state"]["caller"] = await self._known(Headers(scope=scope)) if asked else ANYBODY
        await self._app(scope, receive, send)

    async def _known(self, headers: Headers) -> Caller:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            raise Unauthorized("send an API key: `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        known = self._keys.find(key)
        if known is None:
            raise Unauthorized("this API key is not known")
        if known.expired:
            raise Unauthorized(f"this API key expired on {known.expires}")
        who = known.caller
        if who.rate_per_s:
            await self._broker.allow(who.id, who.rate_per_s, who.burst)
        return who


async def caller(request: Request) -> Caller:
    """Whom the `Guard` let in."""
    return cast(Caller, request.state.caller)


def described(page: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document in which every path that is not open names the schemes."""
    page.setdefault("components", {})["securitySchemes"] = SCHEMES
    for path, verbs in page["paths"].items():
        if path not in OPEN:
            for verb in verbs.values():
                verb["security"] = [{name: []} for name in SCHEMES]
    return page
