"""POST /classify: calibrated probabilities and uncertainty for 1-64 pictures."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from models.api import ClassifyParams
from service.gateway.admission import run_job
from service.gateway.answers import JSON, answer
from service.gateway.asking import Asking, asking
from service.gateway.bodies import Images, classify_input
from service.gateway.imaging import decode_all
from service.gateway.negotiation import choose
from service.gateway.resolve import classify_work, pick_model
from service.gateway.routes.deps import Shared
from service.gateway.routes.jobs import accepted
from service.gateway.schemas import ClassifyForm, ClassifyRequest, ClassifyResponse, body_schema

_FORM = body_schema(ClassifyForm)
_FORM["properties"]["images"] = {"type": "array", "items": {"type": "string", "format": "binary"}}

router = APIRouter()


@router.post(
    "/classify",
    response_model=ClassifyResponse,
    response_model_exclude_none=True,
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
async def classify(
    request: Request,
    gateway: Shared,
    asked: Annotated[Asking, Depends(asking)],
    body: Annotated[tuple[ClassifyParams, Images], Depends(classify_input)],
) -> Any:
    """Classify pictures sent as base64 in JSON or as multipart files (image, images, file or files)."""
    params, encoded = body
    choose(request.headers.get("accept"), (JSON,))
    info = pick_model(await gateway.catalogue.infos(), params.model, "classify")
    request.state.model = info.name
    work = classify_work(
        params, info, await run_in_threadpool(decode_all, encoded, info.image, gateway.settings.max_pixels)
    )
    result = await run_job(gateway, info, params, work, asked)
    if isinstance(result, str):
        return await accepted(request, gateway, result)
    return answer(result, info, time.monotonic() - request.state.arrived)
