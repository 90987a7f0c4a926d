"""What every route depends on."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.gateway.state import Gateway


def gateway_of(request: Request) -> Gateway:
    """The process's Gateway."""
    return cast(Gateway, request.app.state.gateway)


async def shared(request: Request) -> Gateway:
    """The same, for FastAPI, which would run a plain function on a thread."""
    return gateway_of(request)


Shared = Annotated[Gateway, Depends(shared)]
