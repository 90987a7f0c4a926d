"""POST /generate: images as JSON, or the picture itself."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from models.api import GenerateParams, ImageFormat, ModelInfo
from service.gateway.admission import run_job
from service.gateway.asking import Asking, asking
from service.gateway.bodies import generate_params
from service.gateway.imaging import grid
from service.gateway.negotiation import choose
from service.gateway.resolve import generate_work, pick_model
from service.gateway.routes.deps import Shared
from service.gateway.routes.jobs import accepted
from service.gateway.schemas import (
    GeneratedImage,
    GenerateReceipt,
    GenerateRequest,
    GenerateResponse,
    Timings,
    body_schema,
)
from service.protocol import Result

JSON = "application/json"
PICTURES: dict[str, ImageFormat] = {"image/png": "png", "image/webp": "webp"}
MAX_RECEIPT_HEADER = 4096

router = APIRouter()


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "JSON, or with `Accept: image/png`, `image/webp` the picture (a grid for n > 1) with "
            "headers Offramp-Id, Offramp-Seed and Offramp-Receipt.",
            "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in PICTURES},
        }
    },
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": body_schema(GenerateRequest)}}}},
)
async def generate(
    request: Request,
    gateway: Shared,
    asked: Annotated[Asking, Depends(asking)],
    params: Annotated[GenerateParams, Depends(generate_params)],
) -> Any:
    """Draw images."""
    media = choose(request.headers.get("accept"), _offers(params.format))
    info = pick_model(await gateway.catalogue.infos(), params.model, "generate")
    request.state.model = info.name
    work = generate_work(params, info, _worker_format(params, media))
    result = await run_job(gateway, info, params, work, asked)
    if isinstance(result, str):
        return await accepted(gateway, result)
    if media in PICTURES:
        return await _picture(result, media)
    return _answer(result, info, request.state.arrived)


def _offers(preferred: ImageFormat) -> Sequence[str]:
    """JSON first, then pictures, the asked-for `format` before the other."""
    return (JSON, *sorted(PICTURES, key=lambda media: PICTURES[media] != preferred))


def _worker_format(params: GenerateParams, media: str) -> ImageFormat:
    """A picture overrules `format`; the tiles of a grid travel as PNG."""
    if media == JSON:
        return params.format
    return PICTURES[media] if params.n == 1 else "png"


def _answer(result: Result, info: ModelInfo, arrived: float) -> GenerateResponse:
    images = [
        GeneratedImage(b64=base64.b64encode(image.data).decode(), label=info.labels[image.label], seed=image.seed)
        for image in result.images
    ]
    return GenerateResponse(
        id=result.id,
        model=info.name,
        images=images,
        receipt=GenerateReceipt.model_validate(result.receipt),
        timings=Timings(queue_s=result.queue_s, run_s=result.run_s, total_s=time.monotonic() - arrived),
    )


async def _picture(result: Result, media: str) -> Response:
    tiles = [image.data for image in result.images]
    body = tiles[0] if len(tiles) == 1 else await run_in_threadpool(grid, tiles, PICTURES[media])
    headers = {
        "Offramp-Id": result.id,
        "Offramp-Seed": str(result.images[0].seed),
        "Offramp-Receipt": _receipt_header(result.receipt),
    }
    return Response(body, media_type=media, headers=headers)


def _receipt_header(receipt: dict[str, Any]) -> str:
    """The receipt as ASCII JSON, without `exit_depths` when that would make a header clients refuse."""
    text = json.dumps(receipt, separators=(",", ":"))
    if len(text) <= MAX_RECEIPT_HEADER:
        return text
    return json.dumps({k: v for k, v in receipt.items() if k != "exit_depths"}, separators=(",", ":"))
