"""GET and DELETE /jobs/{id}: how a job stands, its answer, its end."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from service.gateway.state import Gateway

router = APIRouter()


async def accepted(gateway: Gateway, job_id: str) -> JSONResponse:
    """202 with where to ask for the job."""
    return JSONResponse({"id": job_id}, 202, {"Location": f"/jobs/{job_id}", "Retry-After": "1"})
