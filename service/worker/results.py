"""From an engine's outputs to the Result that crosses Redis, and to the counters. Runs off the engine's thread."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from models.api import ClassifiedRow, GeneratedRow
from service.errors import JobFailed
from service.metrics import WorkerMetrics
from service.protocol import EncodedImage, Failure, GenerateJob, Prediction, Result, encode
from service.worker.engine import Finished, Progress

PREVIEW_BYTES = 256 * 1024


def encode_image(pixels: Any, format: str) -> bytes:
    """Encode uint8 (H, W, C), C 1 or 3, as png, webp (lossless) or npy; ValueError on anything else."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"pixels must be uint8 (H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, pixels, allow_pickle=False)
    elif format in ("png", "webp"):
        picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
        picture.save(buffer, format, **({"lossless": True} if format == "webp" else {}))
    else:
        raise ValueError(f"unknown image format {format!r}")
    return buffer.getvalue()


def to_result(done: Finished, worker: str, max_bytes: int) -> Result:
    """The Result of a job, its images encoded as it asked; a failure where they have more than `max_bytes`."""
    job = done.delivery.job
    images: tuple[EncodedImage, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    if isinstance(job, GenerateJob):
        images = tuple(_image(row, job.work.format) for row in done.rows)
        if (size := sum(len(image.data) for image in images)) > max_bytes:
            message = f"the images have {size} bytes, OFFRAMP_MAX_RESULT_BYTES allows {max_bytes}: ask for fewer"
            return failed_result(done, worker, message)
    else:
        predictions = tuple(
            Prediction(row.probabilities, row.uncertainty, row.decision, row.prediction_set) for row in done.rows
        )
    return Result(
        id=job.id,
        outcome=done.outcome,
        queue_s=done.queue_s,
        run_s=done.run_s,
        receipt=done.receipt,
        images=images,
        predictions=predictions,
        top_k=0 if isinstance(job, GenerateJob) else job.work.top_k,
        failure=done.failure,
        worker=worker,
    )


def failed_result(done: Finished, worker: str, message: str) -> Result:
    """The Result of a job that cannot be answered."""
    failure = Failure(JobFailed.code, message, JobFailed.retryable)
    return Result(done.delivery.job.id, "failed", done.queue_s, done.run_s, failure=failure, worker=worker)


def told(progress: Progress) -> tuple[bytes, bytes]:
    """What followers are told of a running job: msgpack of how far it is, and of previews (png) by image; empty for
    none. Previews that would take more than `PREVIEW_BYTES` in all are left out."""
    pictures: dict[int, bytes] = {}
    for index, pixels in progress.previews.items():
        picture = encode_image(pixels, "png")
        if sum(map(len, pictures.values())) + len(picture) <= PREVIEW_BYTES:
            pictures[index] = picture
    return encode({"done": progress.done, "of": progress.of}), encode(pictures) if pictures else b""


def _image(row: GeneratedRow, format: str) -> EncodedImage:
    return EncodedImage(encode_image(row.pixels, format), row.label, row.seed)


def record(metrics: WorkerMetrics, model: str, result: Result, done: Finished) -> None:
    """Count an answer that this worker was the one to give."""
    metrics.outcomes.labels(model, result.outcome).inc()
    if result.outcome != "ok":
        return
    job = done.delivery.job
    asked = job.work.gear if isinstance(job, GenerateJob) else job.work.method
    mode = done.receipt.get("gear") or done.receipt.get("method") or asked
    metrics.jobs_by_gear.labels(model, mode, str(done.receipt.get("downgraded", False)).lower()).inc()
    metrics.images.labels(model, mode).inc(len(done.rows))
    if not isinstance(job, GenerateJob):
        _record_uncertainty(metrics, model, mode, done.rows)
        for row in done.rows:
            if row.exit:
                metrics.early_exits.labels(model, str(row.exit)).inc()


def _record_uncertainty(metrics: WorkerMetrics, model: str, method: str, rows: Sequence[ClassifiedRow]) -> None:
    for row in rows:
        if row.decision is not None:
            metrics.decisions.labels(model, method, row.decision).inc()
        if "entropy" in row.uncertainty:
            metrics.entropy.labels(model, method).observe(row.uncertainty["entropy"])
        if "disagreement_source_vs_estimate" in row.uncertainty:
            metrics.disagreement.labels(model, method).observe(row.uncertainty["disagreement_source_vs_estimate"])
