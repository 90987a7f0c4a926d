"""One job's way through the queue: priced, submitted within the budget, awaited, cancelled when nobody waits."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from models.api import ClassifyParams, ClassifyWork, GenerateParams, GenerateWork, ModelInfo, planned_layer_evals
from service.broker.letters import new_id
from service.broker.redis_streams import Submitted
from service.errors import Cancelled, DeadlineExceeded, JobFailed, by_code
from service.gateway.asking import Asking, fingerprint
from service.gateway.replies import Waiter
from service.gateway.resolve import pick_gear
from service.gateway.shedding import Flow
from service.gateway.state import Gateway
from service.gateway.webhooks import check_webhook
from service.protocol import ClassifyJob, GenerateJob, Job, Outcome, Result, Terms

GRACE_S = 0.5
SPENT = 0.7  # share of its budget that an answer may take by what they take now
Work = GenerateWork | ClassifyWork
Params = GenerateParams | ClassifyParams


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


async def run_job(gateway: Gateway, info: ModelInfo, params: Params, work: Work, asked: Asking) -> Result | str:
    """Submit `work` and wait for its result; the job's id when the client would rather not wait any longer.

    A client that hangs up has its job cancelled, unless it can come back for it: by key, or as an async job.

    Raises:
        QueueFull, NoWorker, Unavailable, DeadlineExceeded, IdempotencyConflict, or what the worker failed with.
    """
    check_webhook(params.webhook, gateway.settings)
    budget_s = gateway.settings.deadline_s if params.deadline_ms is None else params.deadline_ms / 1000
    due = asked.arrived + budget_s
    job, priority = await _job(gateway, info, params, work, asked), asked.caller.allowed(params.priority)
    flow = gateway.flows.of(info.name, priority, budget_s)
    if not asked.key:
        _refuse_late(flow, job, SPENT * budget_s - (time.monotonic() - asked.arrived))
    waiting = gateway.metrics.waiting.labels(info.task)
    with gateway.replies.expect(job.id) as waiter, waiting.track_inprogress(), flow.entered():
        submitted = await _queue(gateway, job, params, asked, due, flow)
        if submitted.attached:
            waiter.look.set()
        foreseen_s = submitted.foreseen_ms / 1000 if asked.wait_s is None else 0.0  # who may leave sees early ones only
        answer = _answer(gateway, waiter, job, due, flow, foreseen_s)
        if asked.wait_s is not None:
            try:
                async with asyncio.timeout(asked.wait_s):
                    return await answer
            except TimeoutError:
                return job.id
        if asked.key:
            return await answer
        watch = asyncio.create_task(_watch(asked.request, waiter))
        try:
            return await answer
        except Cancelled:
            if waiter.gone:
                await gateway.broker.cancel(info.name, job.id, gateway.settings.result_ttl_s)
            raise
        finally:
            watch.cancel()


def _refuse_late(flow: Flow, job: Job, left_s: float) -> None:
    """DeadlineExceeded where answers take longer than that by now."""
    if (takes_s := flow.seconds()) > left_s:
        flow.refuse(job.cost)
        late = f"answers of {job.work.model!r} take {takes_s:.2f} s by now"
        raise DeadlineExceeded(f"the deadline cannot be met: {late}", field="deadline_ms")


async def _answer(gateway: Gateway, waiter: Waiter, job: Job, due: float, flow: Flow, foreseen_s: float) -> Result:
    """The result, soon after `due` (time.monotonic()) at the latest; it was foreseen `foreseen_s` from now."""
    queued = time.monotonic()

    def over(outcome: Outcome) -> None:
        now = time.monotonic()
        flow.answered(late=now > due)
        if outcome in ("ok", "expired"):
            flow.forecasts.came_true(foreseen_s, now - queued, due - queued, given_up=outcome == "expired")

    try:
        result = await gateway.replies.result(waiter, job.work.model, job.id, due - queued + GRACE_S)
    except (DeadlineExceeded, Cancelled):
        now = time.monotonic()
        if now > due:
            over("expired")
        elif now - queued > foreseen_s:
            flow.forecasts.came_true(foreseen_s, now - queued, due - queued)
        raise
    over(result.outcome)
    return succeeded(result)


async def _queue(gateway: Gateway, job: Job, params: Params, asked: Asking, due: float, flow: Flow) -> Submitted:
    """Submit before `due`."""
    left_s, limit = due - time.monotonic(), flow.forecasts.limit()
    gateway.metrics.limit.labels(job.work.model).set(limit)
    try:
        async with asyncio.timeout(left_s):
            terms = Terms(
                rows=job.work.rows,
                deadline_ms=max(1, round(left_s * 1000)),
                max_backlog=gateway.settings.max_backlog,
                reply_to=gateway.id,
                priority=asked.caller.allowed(params.priority),
                owner=asked.caller.id,
                max_owed=asked.caller.max_owed,
                events=asked.wait_s is not None,
                webhook=params.webhook or "",
                need_worker=True,
                refused=flow.refused(),
                limit=limit,
            )
            submitted = await gateway.broker.submit(job, terms)
            asked.request.state.queued = True
            return submitted
    except DeadlineExceeded as late:
        if asked.wait_s is None:
            flow.forecasts.refused(late.foreseen_ms / 1000, due - asked.arrived)
        raise
    except TimeoutError:
        flow.answered(late=True)
        raise DeadlineExceeded("the deadline passed before the job was queued", field="deadline_ms") from None


async def _job(gateway: Gateway, info: ModelInfo, params: Params, work: Work, asked: Asking) -> Job:
    """The job under a fresh id, or under the one that its Idempotency-Key stands for."""
    cost, job_id = price(work, info), new_id(info.name)
    if asked.key:
        digest, images = asked.digest(), work.images if isinstance(work, ClassifyWork) else ()
        await gateway.broker.remember(
            digest, fingerprint(info.name, params, images), gateway.settings.idempotency_ttl_s
        )
        job_id = f"{info.name}.{digest[:32]}"
    if isinstance(work, GenerateWork):
        return GenerateJob(id=job_id, cost=cost, work=work)
    return ClassifyJob(id=job_id, cost=cost, work=work)


async def _watch(request: Request, waiter: Waiter) -> None:
    """Tell the waiter when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    waiter.gone = True
    waiter.look.set()


def succeeded(result: Result) -> Result:
    """The result of a job that went well; raises what another ended with."""
    if result.failure:
        field = "deadline_ms" if result.outcome == "expired" else result.failure.field
        raise by_code().get(result.failure.code, JobFailed)(result.failure.message, field=field)
    return result
