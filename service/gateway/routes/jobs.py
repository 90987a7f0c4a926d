"""/jobs/{id}: how a job stands, its answer, what happens to it, its end. Any gateway answers for any job."""

from __future__ import annotations

import asyncio
import math
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service.broker.jobs import JobStatus
from service.broker.letters import model_of
from service.errors import JobOver, NotFound, OfframpError, Unavailable
from service.gateway.admission import succeeded
from service.gateway.answers import PICTURES, answer, offers_of, picture
from service.gateway.auth import caller
from service.gateway.following import Crowd, follow
from service.gateway.negotiation import choose
from service.gateway.routes.deps import Shared
from service.gateway.schemas import ClassifyResponse, GenerateResponse, JobView, Progress, job_state, problem_of
from service.gateway.state import Gateway
from service.keys import Caller
from service.protocol import Result

POLL_S = 0.5
MAX_WAIT_S = 60.0
_ID = re.compile(r"[^{}\s]{1,128}\.[0-9a-f]{32}")

Who = Annotated[Caller, Depends(caller)]
JobId = Annotated[str, Path(description="As POST answered it.")]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for news.")]
EventId = Annotated[str, Query(pattern=r"^\d{1,15}(-\d{1,15})?$", description="Only what came after this event.")]

router = APIRouter()


async def accepted(request: Request, gateway: Gateway, job_id: str) -> Response:
    """202 with the job as it stands and where to ask for it."""
    status = await gateway.broker.status(model_of(job_id), job_id, place=True)
    if status is None:
        raise Unavailable("the store has lost the job: send the request again")
    headers = {"Location": f"/jobs/{job_id}", "Preference-Applied": "respond-async", **_retry_after(status)}
    return _sent(await _view(request, gateway, status), 202, headers)


@router.get("/jobs/{job_id}", response_model=JobView, responses={304: {"description": "As If-None-Match knows it."}})
async def show(
    job_id: JobId,
    request: Request,
    gateway: Shared,
    who: Who,
    wait: Wait = 0.0,
    known: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Response:
    """How a job stands; its answer or its error once it is over. With `wait`, when it is over or no longer `known`."""
    status = await _settled(request, gateway, who, job_id, wait, known)
    headers = {"ETag": _tag(status), "Cache-Control": "private, no-cache"}
    if not status.over:
        headers |= _retry_after(status)
    if known == _tag(status):
        return Response(status_code=304, headers=headers)
    return _sent(await _view(request, gateway, status), 200, headers)


@router.get(
    "/jobs/{job_id}/result",
    response_model=GenerateResponse | ClassifyResponse,
    responses={
        200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in PICTURES}},
        202: {"model": JobView, "description": "It has not ended yet."},
    },
)
async def result(job_id: JobId, request: Request, gateway: Shared, who: Who, wait: Wait = 0.0) -> Response:
    """What the synchronous call would have answered, errors included; `Accept: image/png` gives the picture."""
    status = await _settled(request, gateway, who, job_id, wait)
    if not status.over:
        return _sent(await _view(request, gateway, status), 202, _retry_after(status))
    model = model_of(job_id)
    found = await gateway.broker.result(model, job_id)
    if found is None:
        raise NotFound(f"the result of {job_id} is not kept any more")
    media = choose(request.headers.get("accept"), offers_of(succeeded(found)))
    if media in PICTURES:
        return await picture(found, media)
    return _sent(await _answer(gateway, found), 200)


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
async def events(
    job_id: JobId,
    request: Request,
    gateway: Shared,
    who: Who,
    after: EventId = "0",
    last: Annotated[str | None, Header(alias="Last-Event-ID", pattern=r"^\d{1,15}(-\d{1,15})?$")] = None,
) -> Response:
    """What happens to a job, as server-sent events: queued, started, progress, preview, completed."""
    await _mine(gateway, who, job_id)
    crowd: Crowd = request.app.state.crowd
    crowd.admit(who)
    story = follow(gateway, crowd, who, job_id, last or after, request.app.state.leaving)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(story, media_type="text/event-stream", headers=headers)


@router.delete("/jobs/{job_id}", response_model=JobView)
async def cancel(job_id: JobId, request: Request, gateway: Shared, who: Who) -> Response:
    """End a job now, whether it waits or runs; 409 for one that ended otherwise. Cancelling twice is no error."""
    await _mine(gateway, who, job_id)
    await gateway.broker.cancel(model_of(job_id), job_id, gateway.settings.result_ttl_s)
    status = await _mine(gateway, who, job_id)
    if status.state != "cancelled":
        raise JobOver(f"the job has ended before: {job_state(status.state)}")
    return _sent(await _view(request, gateway, status), 200)


async def _mine(gateway: Gateway, who: Caller, job_id: str, place: bool = False) -> JobStatus:
    """A job that the caller asked for; NotFound for any other."""
    status = await gateway.broker.status(model_of(job_id), job_id, place) if _ID.fullmatch(job_id) else None
    if status is None or status.owner != who.id:
        raise NotFound(f"no job {job_id!r}, or it ended more than OFFRAMP_RESULT_TTL_S ago", field="job_id")
    return status


async def _settled(
    request: Request, gateway: Gateway, who: Caller, job_id: str, wait_s: float, known: str | None = None
) -> JobStatus:
    """The job once it is over or differs from what is `known` of it, or after `wait_s`, or when nobody listens."""
    if not wait_s:
        return await _mine(gateway, who, job_id, place=True)
    crowd: Crowd = request.app.state.crowd
    crowd.admit(who)
    end = time.monotonic() + wait_s
    with crowd.joined(who), gateway.replies.expect(job_id) as waiter:
        while True:
            left = end - time.monotonic()
            status = await _mine(gateway, who, job_id, place=left <= 0)
            if status.over or left <= 0 or (known and known != _tag(status)):
                return status
            if request.app.state.leaving() or await request.is_disconnected():
                return status
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, POLL_S)):
                    await waiter.look.wait()
            waiter.look.clear()


async def _view(request: Request, gateway: Gateway, status: JobStatus) -> JobView:
    view = JobView(
        id=status.id,
        model=model_of(status.id),
        status=job_state(status.state),
        created=datetime.fromtimestamp(status.submitted_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        deadline_ms=status.deadline_ms - status.submitted_ms,
        position=status.position,
        eta_s=None if status.eta_s is None else round(status.eta_s, 3),
        progress=Progress(done=status.done, of=status.of) if status.state == "running" and status.of else None,
    )
    found = await gateway.broker.result(view.model, status.id) if status.over else None
    if found is None:
        return view
    try:
        view.result = await _answer(gateway, succeeded(found))
    except OfframpError as error:
        view.error = problem_of(error, f"/jobs/{status.id}", request.state.request_id)
    return view


async def _answer(gateway: Gateway, found: Result) -> GenerateResponse | ClassifyResponse:
    info = await gateway.broker.info(model_of(found.id))
    if info is None:
        raise Unavailable(f"nothing is known of the model {model_of(found.id)!r} any more")
    return answer(found, info, found.queue_s + found.run_s)


def _tag(status: JobStatus) -> str:
    """Changes when there is something new to say, the estimates of place and time aside."""
    return f'W/"{status.state}.{status.done}.{status.submitted_ms}"'


def _retry_after(status: JobStatus) -> dict[str, str]:
    return {"Retry-After": str(max(1, min(60, math.ceil(status.eta_s or 0))))}


def _sent(body: Any, code: int, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body.model_dump(exclude_none=True), code, headers)
