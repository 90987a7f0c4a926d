"""Jobs and deliveries for the worker's tests."""

from __future__ import annotations

from itertools import count
from uuid import uuid4

from models.api import ClassifyWork, GenerateWork, ImageFormat
from service.protocol import ClassifyJob, Delivery, GenerateJob, Job

GATEWAY = "gateway-of-tests"
_attempts = count()


def draw(
    rows: int = 1, steps: int = 3, seed: int = 0, label: int = 0, model: str = "toy", format: ImageFormat = "npy"
) -> GenerateJob:
    """A job of `rows` images with seeds from `seed`."""
    work = GenerateWork(
        model=model,
        labels=(label,) * rows,
        seeds=tuple(range(seed, seed + rows)),
        steps=steps,
        solver="ddim",
        guidance=1.0,
        gear="full",
        format=format,
    )
    return GenerateJob(id=uuid4().hex, cost=rows * steps * 4, work=work)


def judge(images: tuple[bytes, ...] = (b"\1",), model: str = "judge") -> ClassifyJob:
    """A job that classifies one-byte images."""
    work = ClassifyWork(model=model, images=images, method="single", top_k=1)
    return ClassifyJob(id=uuid4().hex, cost=len(images), work=work)


def delivery(job: Job, budget_ms: int = 60_000, waited_ms: int = 0, deliveries: int = 1) -> Delivery:
    """A job as it is taken `waited_ms` after its submission, with `budget_ms` left."""
    attempt = f"attempt-{next(_attempts)}"
    return Delivery(
        job, f"entry-{job.id}", attempt, deliveries, 1_000_000 - waited_ms, 1_000_000 + budget_ms, 1_000_000
    )
