"""POST /classify: calibrated probabilities and uncertainty for 1-64 pictures."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.gateway.admission import run_job
from service.gateway.answers import JSON, answer, body_of
from service.gateway.asking import asking
from service.gateway.bodies import classify_input
from service.gateway.imaging import decoded
from service.gateway.negotiation import choose
from service.gateway.resolve import classify_work, pick_model
from service.gateway.routes.deps import gateway_of
from service.gateway.routes.jobs import accepted
from service.gateway.schemas import ClassifyForm, ClassifyRequest, ClassifyResponse, body_schema

_FORM = body_schema(ClassifyForm)
_FORM["properties"]["images"] = {"type": "array", "items": {"type": "string", "format": "binary"}}

router = APIRouter()


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": body_schema(ClassifyRequest)},
                "multipart/form-data": {"schema": _FORM},
            },
        }
    },
)
async def classify(request: Request) -> Response:
    """Classify pictures sent as base64 in JSON or as multipart files (image, images, file or files)."""
    gateway, asked = gateway_of(request), asking(request)
    params, encoded = await classify_input(request)
    choose(request.headers.get("accept"), (JSON,))
    info = pick_model(await gateway.catalogue.infos(), params.model, "classify")
    request.state.model = info.name
    work = classify_work(params, info, await decoded(encoded, info.image, gateway.settings.max_pixels))
    result = await run_job(gateway, info, params, work, asked)
    if isinstance(result, str):
        return await accepted(request, gateway, result)
    return Response(body_of(answer(result, info, time.monotonic() - asked.arrived)), media_type=JSON)
