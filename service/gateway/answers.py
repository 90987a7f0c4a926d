"""From a Result to what a client sees: the same for an answer that was waited for and for one fetched later."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from models.api import ImageFormat, ModelInfo
from service.gateway.imaging import encoding_of, grid
from service.gateway.schemas import (
    Classification,
    ClassifyReceipt,
    ClassifyResponse,
    GeneratedImage,
    GenerateReceipt,
    GenerateResponse,
    RankedClass,
    Timings,
)
from service.protocol import Prediction, Result

JSON = "application/json"
PICTURES: dict[str, ImageFormat] = {"image/png": "png", "image/webp": "webp"}
MAX_RECEIPT = 4096


def offers(preferred: ImageFormat | None) -> Sequence[str]:
    """JSON first, then pictures, the `preferred` encoding before the other; None for an answer without pictures."""
    if preferred is None:
        return (JSON,)
    return (JSON, *sorted(PICTURES, key=lambda media: PICTURES[media] != preferred))


def offers_of(result: Result) -> Sequence[str]:
    """What a result can be sent as."""
    return offers(encoding_of(result.images[0].data) if result.images else None)


def answer(result: Result, info: ModelInfo, total_s: float) -> GenerateResponse | ClassifyResponse:
    """The JSON answer of a job that went well; `info` names its labels."""
    timings = Timings(queue_s=result.queue_s, run_s=result.run_s, total_s=total_s)
    if info.task == "classify":
        return ClassifyResponse(
            id=result.id,
            model=info.name,
            results=[classification(prediction, info.labels, result.top_k) for prediction in result.predictions],
            receipt=ClassifyReceipt.model_validate(result.receipt),
            timings=timings,
        )
    images = [
        GeneratedImage(b64=base64.b64encode(image.data).decode(), label=info.labels[image.label], seed=image.seed)
        for image in result.images
    ]
    receipt = GenerateReceipt.model_validate(result.receipt)
    return GenerateResponse(id=result.id, model=info.name, images=images, receipt=receipt, timings=timings)


def body_of(answer: GenerateResponse | ClassifyResponse) -> bytes:
    """JSON of an answer, without what is absent."""
    return answer.__pydantic_serializer__.to_json(answer, exclude_none=True)


def classification(prediction: Prediction, labels: Sequence[str], top_k: int) -> Classification:
    """The answer for one image: classes by falling probability, ties by index; `top_k` 0 lists all."""
    p, members = prediction.probabilities, prediction.prediction_set
    order = sorted(range(len(p)), key=lambda index: (-p[index], index))[: top_k or None]
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


async def picture(result: Result, media: str) -> Response:
    """The images themselves, as one picture of type `media`, whatever they are encoded as."""
    tiles, wanted = [image.data for image in result.images], PICTURES[media]
    untouched = len(tiles) == 1 and encoding_of(tiles[0]) == wanted
    body = tiles[0] if untouched else await run_in_threadpool(grid, tiles, wanted)
    headers = {
        "Offramp-Id": result.id,
        "Offramp-Seed": str(result.images[0].seed),
        "Offramp-Receipt": compact(short_receipt(result.receipt)),
    }
    return Response(body, media_type=media, headers=headers)


def short_receipt(receipt: dict[str, Any]) -> dict[str, Any]:
    """The receipt, without `exit_depths` where it would grow beyond 4 KiB: clients refuse such headers."""
    if len(compact(receipt)) <= MAX_RECEIPT:
        return receipt
    return {key: value for key, value in receipt.items() if key != "exit_depths"}


def compact(value: Any) -> str:
    """ASCII JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))
