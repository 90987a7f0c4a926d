"""GET /healthz, /readyz, /metrics: for probes and Prometheus."""

from __future__ import annotations

import asyncio
from typing import get_args

from fastapi import APIRouter
from redis.exceptions import RedisError
from starlette.responses import Response

from models.api import ModelInfo
from service.broker.redis_streams import QueueStats
from service.errors import NoWorker, OfframpError
from service.gateway.routes.deps import Shared
from service.gateway.state import Gateway
from service.metrics import OUTCOMES, REFUSALS
from service.protocol import Outcome

SCRAPE_BUDGET_S = 2.0

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive; says nothing of Redis or workers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(gateway: Shared) -> dict[str, str | dict[str, int]]:
    """Redis answers and every advertised model has a live worker (counts by model); 503 otherwise."""
    await gateway.broker.check()
    workers = {model: await gateway.broker.live_workers(model) for model in sorted(await gateway.broker.catalogue())}
    if not workers:
        raise NoWorker("no worker advertises a model")
    if idle := [model for model, count in workers.items() if not count]:
        raise NoWorker(f"no live worker for {', '.join(idle)}", field="model")
    return {"status": "ready", "models": workers}


@router.get("/metrics", response_class=Response)
async def metrics(gateway: Shared) -> Response:
    """Prometheus text; queue gauges are read from Redis now and absent while it is away."""
    try:
        async with asyncio.timeout(SCRAPE_BUDGET_S):
            infos = await gateway.catalogue.infos()
            stats = [(info, await gateway.broker.queue_stats(info.name)) for info in infos.values()]
    except (RedisError, OfframpError, TimeoutError):
        stats = []
    _set_gauges(gateway, stats)
    return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _set_gauges(gateway: Gateway, stats: list[tuple[ModelInfo, QueueStats]]) -> None:
    m = gateway.metrics
    for gauge in (m.queue_jobs, m.backlog, m.jobs, m.letters, m.workers):
        gauge.clear()
    for info, queue in stats:
        m.queue_jobs.labels(info.name).set(queue.jobs)
        m.backlog.labels(info.name).set(queue.backlog)
        m.letters.labels(info.name).set(queue.letters)
        m.workers.labels(info.name).set(queue.workers)
        for state in ("accepted", *get_args(Outcome)):
            m.jobs.labels(info.name, state).set(queue.ledger.get(state, 0))
        m.duration.labels(info.task, info.name)
        m.waiting.labels(info.task)
        for outcome in OUTCOMES:
            m.requests.labels(info.task, info.name, outcome)
        for reason in REFUSALS:
            m.refusals.labels(info.name, reason)
