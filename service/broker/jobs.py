"""What anybody may ask of a job: how it stands, what happened to it, to cancel it; and limits of who asks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from service.broker import keys
from service.broker.connection import BLOCK_MS, reachable
from service.broker.store import ALIVE_MS, Store, as_bytes, entries
from service.errors import IdempotencyConflict, RateLimited, Unavailable
from service.protocol import Result, decode

KEPT = 4_000  # entries of a stream of wake-ups
KEPT_S = 600
INLINE = 4096  # bytes of a result that travel with its wake-up


@dataclass(frozen=True)
class JobStatus:
    """A job as it stands.

    Attributes:
        state: queued, running or an Outcome.
        position: jobs that go before it, for one that is queued, where asked for; 200 for as many or more.
        eta_s: seconds until it is taken, at the measured rate; None where unknown; at least that for position 200.
        done, of: evaluations of all rows; 0 before the first checkpoint.
        deadline_ms, submitted_ms: Redis TIME.
    """

    id: str
    state: str
    owner: str
    submitted_ms: int
    deadline_ms: int
    position: int | None = None
    eta_s: float | None = None
    done: int = 0
    of: int = 0

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state not in ("queued", "running")


@dataclass(frozen=True)
class Event:
    """One line of a job's story: queued, started, progress, preview, completed; `id` is where to go on.

    A preview's pictures are not part of it: `Jobs.preview` has the newest.
    """

    id: str
    name: str
    data: bytes


@dataclass(frozen=True)
class Wake:
    """A job that ended, the gateways that wait for it, and its encoded result."""

    gateways: tuple[str, ...]
    id: str
    result: bytes = b""


class Jobs(Store):
    """Any gateway's questions about any job."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._expiring: dict[str, float] = {}

    @reachable
    async def result(self, model: str, job_id: str) -> Result | None:
        """The result of a finished job, while it is kept."""
        raw = await self._redis.get(keys.result(model, job_id))
        return None if raw is None else decode(Result, as_bytes(raw))

    @reachable
    async def knows(self, model: str, job_id: str) -> bool:
        """Whether the store has the job, or its result."""
        return bool(await self._redis.exists(keys.job(model, job_id), keys.result(model, job_id)))

    @reachable
    async def status(self, model: str, job_id: str, place: bool = False) -> JobStatus | None:
        """How a job stands, with `place` its position too; None when it is not known (any more)."""
        found = await self._run("status", model, job_id, ALIVE_MS, int(place))
        if not found:
            return None
        (state, owner, submitted, deadline, done, of), ahead, cost, rate = found
        return JobStatus(
            id=job_id,
            state=state.decode(),
            owner=(owner or b"").decode(),
            submitted_ms=int(submitted),
            deadline_ms=int(deadline),
            position=int(ahead) if ahead >= 0 else None,
            eta_s=int(cost) / float(rate) if ahead >= 0 and float(rate) > 0 else None,
            done=int(done or 0),
            of=int(of or 0),
        )

    @reachable
    async def cancel(self, model: str, job_id: str, ttl_s: int) -> bool:
        """End a job that has not ended, and tell its worker and whoever waits for it; False when it is over."""
        ended, *known = await self._run("cancel", model, job_id, ttl_s)
        if not ended:
            return False
        handle, worker, gateways = (value.decode() for value in known)
        with suppress(Unavailable):  # it has ended: the worker's next heartbeat and the gateways' next look tell them
            await self._tell_of_cancel(model, job_id, handle, worker, gateways.split())
        return True

    @reachable
    async def _tell_of_cancel(self, model: str, job_id: str, handle: str, worker: str, gateways: list[str]) -> None:
        if worker:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xadd(keys.control(worker), {"entry": handle, "model": model}, maxlen=KEPT)
                pipe.expire(keys.control(worker), KEPT_S)
                await pipe.execute()
        await self.notify([Wake(tuple(gateways), job_id)])

    @reachable
    async def events(self, model: str, job_id: str, after: str = "0", block_ms: int = BLOCK_MS) -> list[Event]:
        """What happened past `after`, waiting up to `block_ms` (a second at most) for news."""
        key = keys.events(model, job_id)
        found = await self._redis.xread({key: after}, count=200, block=max(1, min(block_ms, BLOCK_MS)))
        return [
            Event(entry.decode(), fields[b"name"].decode(), as_bytes(fields[b"data"]))
            for entry, fields in entries(found)
        ]

    @reachable
    async def preview(self, model: str, job_id: str) -> bytes:
        """The newest preview of a running job; empty without one."""
        return as_bytes(await self._redis.get(keys.preview(model, job_id)) or b"")

    @reachable
    async def notify(self, wakes: Sequence[Wake]) -> None:
        """Wake the gateways that wait for jobs. Streams that nobody reads any more expire."""
        now, renewed, commands = time.monotonic(), set[str](), list[tuple[str | int | bytes, ...]]()
        for wake in wakes:
            inline = wake.result if len(wake.result) <= INLINE else b""
            for gateway in wake.gateways:
                key = keys.reply(gateway)
                commands.append(("XADD", key, "MAXLEN", "~", KEPT, "*", "id", wake.id, "result", inline))
                if gateway not in renewed and now - self._expiring.get(gateway, -KEPT_S) > KEPT_S / 4:
                    commands.append(("EXPIRE", key, KEPT_S))
                    renewed.add(gateway)
        if len(commands) == 1:
            await self._command(*commands[0])
        elif commands:
            async with self._redis.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                await pipe.execute()
        self._expiring |= dict.fromkeys(renewed, now)

    @reachable
    async def remember(self, digest: str, fingerprint: str, ttl_s: int) -> None:
        """Let an Idempotency-Key (`digest` of it and its owner) stand for a request.

        Raises:
            IdempotencyConflict: it stands for another one.
        """
        key = keys.idempotency(digest)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(key, fingerprint, nx=True, ex=ttl_s)
            pipe.get(key)
            _, known = await pipe.execute()
        if known is not None and as_bytes(known).decode() != fingerprint:
            raise IdempotencyConflict(
                "this Idempotency-Key came with another request before: send a new key", field="Idempotency-Key"
            )

    @reachable
    async def allow(self, owner: str, rate_per_s: float, burst: int) -> None:
        """Take a token from the owner's bucket of `burst` tokens, filled at `rate_per_s`; RateLimited when empty."""
        wait_ms = await self._script("bucket", keys.bucket(owner), rate_per_s, burst)
        if wait_ms:
            seconds = -(-int(wait_ms) // 1000)
            raise RateLimited(f"more than {rate_per_s:g} requests a second", retry_after_s=seconds)
