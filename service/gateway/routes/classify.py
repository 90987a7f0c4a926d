"""POST /classify: calibrated probabilities and uncertainty for 1-64 pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from models.api import ClassifyParams
from service.gateway.admission import run_job
from service.gateway.asking import Asking, asking
from service.gateway.bodies import Images, classify_input
from service.gateway.imaging import decode_all
from service.gateway.negotiation import choose
from service.gateway.resolve import classify_work, pick_model
from service.gateway.routes.deps import Shared
from service.gateway.routes.jobs import accepted
from service.gateway.schemas import (
    Classification,
    ClassifyForm,
    ClassifyReceipt,
    ClassifyRequest,
    ClassifyResponse,
    RankedClass,
    Timings,
    body_schema,
)
from service.protocol import Prediction

JSON = "application/json"
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
        return await accepted(gateway, result)
    return ClassifyResponse(
        id=result.id,
        model=info.name,
        results=[classification(prediction, info.labels, work.top_k) for prediction in result.predictions],
        receipt=ClassifyReceipt.model_validate(result.receipt),
        timings=Timings(queue_s=result.queue_s, run_s=result.run_s, total_s=time.monotonic() - request.state.arrived),
    )


def classification(prediction: Prediction, labels: Sequence[str], top_k: int) -> Classification:
    """The answer for one image: classes by falling probability, ties by index."""
    p, members = prediction.probabilities, prediction.prediction_set
    order = sorted(range(len(p)), key=lambda index: (-p[index], index))[:top_k]
    ranked = [RankedClass(label=labels[index], index=index, score=p[index]) for index in order]
    return Classification(
        label=ranked[0].label,
        index=ranked[0].index,
        score=ranked[0].score,
        top_k=ranked,
        probabilities=dict(zip(labels, p, strict=True)),
        uncertainty=prediction.uncertainty,
        decision=prediction.decision,
        prediction_set=None if members is None else [labels[index] for index in members],
    )
