"""What every route depends on."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.gateway.state import Gateway


async def shared(request: Request) -> Gateway:
    """The process's Gateway."""
    return cast(Gateway, request.app.state.gateway)


Shared = Annotated[Gateway, Depends(shared)]
