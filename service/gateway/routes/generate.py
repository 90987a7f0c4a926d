"""POST /generate: images as JSON, or the picture itself."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from models.api import GenerateParams, ImageFormat
from service.gateway.admission import run_job
from service.gateway.answers import JSON, PICTURES, answer, body_of, offers, picture
from service.gateway.asking import asking
from service.gateway.bodies import generate_params
from service.gateway.negotiation import choose
from service.gateway.resolve import generate_work, pick_model
from service.gateway.routes.deps import gateway_of
from service.gateway.routes.jobs import accepted
from service.gateway.schemas import GenerateRequest, GenerateResponse, body_schema

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
async def generate(request: Request) -> Response:
    """Draw images."""
    gateway, asked = gateway_of(request), asking(request)
    params = await generate_params(request)
    media = choose(request.headers.get("accept"), offers(params.format))
    info = pick_model(await gateway.catalogue.infos(), params.model, "generate")
    request.state.model = info.name
    work = generate_work(params, info, _worker_format(params, media))
    result = await run_job(gateway, info, params, work, asked)
    if isinstance(result, str):
        return await accepted(request, gateway, result)
    if media in PICTURES:
        return await picture(result, media)
    return Response(body_of(answer(result, info, time.monotonic() - asked.arrived)), media_type=JSON)


def _worker_format(params: GenerateParams, media: str) -> ImageFormat:
    """A picture overrules `format`; the tiles of a grid travel as PNG."""
    if media == JSON:
        return params.format
    return PICTURES[media] if params.n == 1 else "png"
