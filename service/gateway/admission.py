"""One job's way through the queue: priced, submitted against the backlog's budget, awaited."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

from models.api import ClassifyWork, GenerateWork, ModelInfo, planned_layer_evals
from service.errors import DeadlineExceeded, JobFailed, NoWorker, by_code
from service.gateway.resolve import pick_gear
from service.gateway.state import Gateway
from service.protocol import ClassifyJob, GenerateJob, Job, Result

GRACE_S = 0.5
Work = GenerateWork | ClassifyWork


def price(work: Work, info: ModelInfo) -> int:
    """Planned cost of a job, at least 1: layer evaluations (generate) or network calls (classify)."""
    if isinstance(work, GenerateWork):
        gear = pick_gear(info, work.gear)
        planned = planned_layer_evals(gear, work.steps, work.guidance, work.rows, work.solver, work.guidance_interval)
    else:
        calls, purifier = info.calls.get(work.method, 1), info.purifier
        if work.purify is not None and purifier is not None:
            calls = work.purify * (purifier.calls + calls)
        planned = calls * work.rows
    return max(1, planned)


async def run_job(gateway: Gateway, info: ModelInfo, work: Work, deadline_ms: int | None, arrived: float) -> Result:
    """Submit `work` and wait for its result.

    Args:
        deadline_ms: the client's budget; None takes the setting's.
        arrived: time.monotonic() at which the request came in; the budget counts from there.

    Raises:
        QueueFull, NoWorker, Unavailable, DeadlineExceeded, or what the worker failed with.
    """
    budget_s = gateway.settings.deadline_s if deadline_ms is None else deadline_ms / 1000
    job = _job(gateway, info, work)
    waiting = gateway.metrics.waiting.labels(info.task)
    with gateway.replies.expect(job.id) as event, waiting.track_inprogress():
        left_s = await _queue(gateway, info, job, budget_s, arrived)
        result = await gateway.replies.result(event, info.name, job.id, left_s + GRACE_S)
    _raise_failure(result)
    return result


async def _queue(gateway: Gateway, info: ModelInfo, job: Job, budget_s: float, arrived: float) -> float:
    """Submit within the budget; returns the seconds that are left of it."""
    try:
        async with asyncio.timeout(budget_s - (time.monotonic() - arrived)):
            if not await gateway.broker.live_workers(info.name):
                raise NoWorker(f"no live worker serves {info.name!r} now", field="model")
            left_s = budget_s - (time.monotonic() - arrived)
            budget_ms = max(1, round(left_s * 1000))
            await gateway.broker.submit(job, job.work.rows, budget_ms, gateway.settings.max_backlog)
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the job was queued", field="deadline_ms") from None
    return left_s


def _job(gateway: Gateway, info: ModelInfo, work: Work) -> Job:
    job_id, cost = uuid4().hex, price(work, info)
    if isinstance(work, GenerateWork):
        return GenerateJob(id=job_id, reply_to=gateway.id, cost=cost, work=work)
    return ClassifyJob(id=job_id, reply_to=gateway.id, cost=cost, work=work)


def _raise_failure(result: Result) -> None:
    if result.failure:
        field = "deadline_ms" if result.outcome == "expired" else result.failure.field
        raise by_code().get(result.failure.code, JobFailed)(result.failure.message, field=field)
