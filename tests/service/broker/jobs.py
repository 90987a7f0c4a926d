from __future__ import annotations

from uuid import uuid4

from models.api import ClassifyWork, ModelInfo
from service.protocol import ClassifyJob, Delivery, Result


def job(model: str, rows: int = 1, cost: int = 10) -> ClassifyJob:
    work = ClassifyWork(model=model, images=(b"x",) * rows, method="single", top_k=1)
    return ClassifyJob(id=uuid4().hex, cost=cost, work=work)


def ok(delivery: Delivery, worker: str = "w") -> Result:
    return Result(delivery.job.id, "ok", worker=worker)


def info(model: str) -> ModelInfo:
    return ModelInfo(model, "classify", ("a", "b"), (1, 1, 1), "w", methods={"single": 1.0})
