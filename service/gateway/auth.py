"""Who asks: the API key of a request, recognised and held to its rate."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.errors import Unauthorized
from service.gateway.routes.deps import Shared
from service.keys import Caller

__all__ = ["Caller", "caller"]

ANYBODY = Caller()
BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="An API key, where the gateway has any.")
HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="apiKey", description="The same, as a header.")


async def caller(
    gateway: Shared,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    header: Annotated[str | None, Depends(HEADER)],
) -> Caller:
    """Whoever the request's key stands for; anybody, without limits, where no keys are configured.

    Raises:
        Unauthorized: no key, an unknown or an expired one.
        RateLimited: the key asks too often.
    """
    if not gateway.keys.configured:
        return ANYBODY
    key = bearer.credentials if bearer else header
    if not key:
        raise Unauthorized("send an API key: `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    known = gateway.keys.find(key)
    if known is None:
        raise Unauthorized("this API key is not known")
    if known.expired:
        raise Unauthorized(f"this API key expired on {known.expires}")
    who = known.caller
    if who.rate_per_s:
        await gateway.broker.allow(who.id, who.rate_per_s, who.burst)
    return who
