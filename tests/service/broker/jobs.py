from __future__ import annotations

from uuid import uuid4

from models.api import ClassifyWork, ModelInfo
from service.protocol import ClassifyJob, Delivery, Result, Terms

LONG = 60_000
TTL_S = 60


def job(model: str, rows: int = 1, cost: int = 10) -> ClassifyJob:
    work = ClassifyWork(model=model, images=(b"x",) * rows, method="single", top_k=1)
    return ClassifyJob(id=uuid4().hex, cost=cost, work=work)


def ok(delivery: Delivery, worker: str = "w") -> Result:
    return Result(delivery.job.id, "ok", worker=worker)


def info(model: str) -> ModelInfo:
    return ModelInfo(model, "classify", ("a", "b"), (1, 1, 1), "w", methods={"single": 1.0})


async def put(broker, model, rows=1, cost=10, deadline_ms=30_000, max_backlog=10_000_000, **terms) -> ClassifyJob:
    """One job, queued."""
    made = job(model, rows, cost)
    await broker.submit(made, Terms(rows, deadline_ms, max_backlog, **terms))
    return made


async def take_one(broker, model, worker="w", lease_ms=LONG, **more) -> Delivery:
    [delivery] = (await broker.take(model, worker, 4, 4, lease_ms, **more)).deliveries
    return delivery


async def books(broker, model) -> tuple[int, int]:
    """(accepted - outcomes - entries, backlog): (0, 0) when all is told and nothing is left."""
    stats = await broker.queue_stats(model)
    ended = sum(count for state, count in stats.ledger.items() if state != "accepted")
    return stats.ledger["accepted"] - ended - stats.jobs, stats.backlog
