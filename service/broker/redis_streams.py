"""The broker: jobs wait in one Redis stream per model, under leases, until one result is written.

At-least-once execution, exactly-once visible result. Every script touches the keys of one model, that is
one slot. Lease = pending entry of the consumer group; its idle time is the time since the last heartbeat.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from redis.exceptions import ResponseError

from models.api import ModelInfo
from service.broker import keys
from service.broker.connection import BLOCK_MS, connect, reachable, refuse_unfit
from service.errors import JobFailed, QueueFull
from service.protocol import Delivery, Failure, Job, Result, decode, decode_info, decode_job, encode

LUA = Path(__file__).parent / "lua"
ALIVE_MS = 15_000
ADVERTISED_MS = 60_000
REPLIES_KEPT = 10_000
REPLY_TTL_S = 600
UNREADABLE_TTL_S = 600

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """An accepted job: its stream entry, and the backlog (cost) that includes it."""

    entry: str
    backlog: int


@dataclass(frozen=True)
class Taken:
    """What a worker got; `full` when the next job did not fit; `cursor` is where `wait` goes on."""

    deliveries: list[Delivery]
    full: bool
    cursor: str


@dataclass(frozen=True)
class QueueStats:
    """A model's queue: jobs waiting or running, their cost, the ledger, live workers."""

    jobs: int
    backlog: int
    ledger: dict[str, int]
    workers: int


class Broker:
    """One process's connection to the queue; `url` is redis://, rediss:// or unix://."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url)
        self._submit, self._take, self._heartbeat, self._finish = (
            self._redis.register_script((LUA / f"{name}.lua").read_text())
            for name in ("submit", "take", "heartbeat", "finish")
        )
        self._token = uuid4().hex[:8]

    @reachable
    async def check(self) -> None:
        """Refuse a server that would lose work: too old, or free to evict keys."""
        refuse_unfit(await self._redis.info())

    async def aclose(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    # gateway side

    @reachable
    async def submit(self, job: Job, rows: int, deadline_ms: int, max_backlog: int) -> Submitted:
        """Queue a job with a budget of `deadline_ms`; QueueFull when the backlog would pass `max_backlog`."""
        model = job.work.model
        accepted, entry, backlog = await self._submit(
            keys=[keys.queue(model), keys.job(model, job.id), keys.backlog(model), keys.ledger(model)],
            args=[job.id, encode(job), rows, job.cost, deadline_ms, max_backlog],
        )
        if not accepted:
            wait = await self._drain_s(model, int(backlog))
            raise QueueFull(f"{model!r} has a backlog of {backlog} of {max_backlog}", retry_after_s=wait)
        return Submitted(entry.decode(), int(backlog))

    async def _drain_s(self, model: str, backlog: int) -> int:
        """Seconds until the backlog has drained at the live workers' measured rates, 1..60; 5 where none is known."""
        live = set(await self._live(model))
        rates = await self._redis.hgetall(keys.rates(model))
        rate = sum(float(value) for worker, value in rates.items() if worker in live)
        return 5 if rate <= 0 else max(1, min(60, math.ceil(backlog / rate)))

    @reachable
    async def replies(self, gateway: str, after: str) -> tuple[list[tuple[str, str]], str]:
        """Wake-ups (job id, status) past `after`, waiting up to a second; and the last id seen."""
        found = await self._redis.xread({keys.reply(gateway): after}, count=500, block=BLOCK_MS)
        entries = _entries(found)
        wakes = [(fields[b"id"].decode(), fields[b"status"].decode()) for _, fields in entries]
        return wakes, entries[-1][0].decode() if entries else after

    @reachable
    async def result(self, model: str, job_id: str) -> Result | None:
        """The result of a finished job, while it is kept."""
        raw = await self._redis.get(keys.result(model, job_id))
        return None if raw is None else decode(Result, _bytes(raw))

    @reachable
    async def catalogue(self) -> dict[str, ModelInfo]:
        """Every model by name that a worker advertised within the last minute."""
        raw = await self._redis.hgetall(keys.CATALOGUE)
        infos = [decode_info(_bytes(value)) for _, value in sorted(raw.items())]
        return {info.name: info for info in infos if await self._redis.exists(keys.workers(info.name))}

    @reachable
    async def live_workers(self, model: str) -> int:
        """Workers of `model` that gave a sign of life lately."""
        return len(await self._live(model))

    @reachable
    async def queue_stats(self, model: str) -> QueueStats:
        """Numbers for gauges, read at scrape."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xlen(keys.queue(model))
            pipe.get(keys.backlog(model))
            pipe.hgetall(keys.ledger(model))
            jobs, backlog, ledger = await pipe.execute()
        counts = {name.decode(): int(count) for name, count in ledger.items()}
        return QueueStats(int(jobs), int(backlog or 0), counts, await self.live_workers(model))

    # worker side

    @reachable
    async def ensure(self, model: str) -> None:
        """Create the consumer group at the start of the stream, so that no backlog is missed."""
        try:
            await self._redis.xgroup_create(keys.queue(model), keys.GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    @reachable
    async def take(self, model: str, worker: str, free_rows: int, capacity: int, lease_ms: int) -> Taken:
        """Take jobs that fit `free_rows` of `capacity` slots; leases idle for `lease_ms` come first."""
        args: list[str | int] = [keys.GROUP, worker, free_rows, capacity, lease_ms, self._token]
        try:
            full, cursor, rows = await self._take(
                keys=[keys.queue(model), keys.job(model, ""), keys.backlog(model), keys.ledger(model)], args=args
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            await self.ensure(model)
            return Taken([], False, "0-0")
        deliveries = [delivery for row in rows if (delivery := await self._open(model, row))]
        return Taken(deliveries, bool(full), cursor.decode())

    async def _open(self, model: str, row: Sequence[Any]) -> Delivery | None:
        """The delivery of a row of take.lua; a job that cannot be read ends here as failed."""
        job_id, entry, deliveries, now, attempt, payload, submitted, deadline = row
        try:
            return Delivery(
                job=decode_job(payload),
                entry=entry.decode(),
                attempt=attempt.decode(),
                deliveries=int(deliveries),
                submitted_ms=int(submitted),
                deadline_ms=int(deadline),
                taken_ms=int(now),
            )
        except msgspec.DecodeError as error:
            log.error("job %s of %s cannot be read: %s", job_id.decode(), model, error)
        failure = Failure(JobFailed.code, "the worker could not read the job: gateway and worker differ in version?")
        result = Result(job_id.decode(), "failed", failure=failure)
        await self._close(model, job_id.decode(), entry.decode(), attempt.decode(), result, UNREADABLE_TTL_S)
        return None

    @reachable
    async def wait(self, model: str, cursor: str, timeout_ms: int) -> None:
        """Return when the stream has an entry past `cursor` or after `timeout_ms`, a second at most; claims nothing."""
        await self._redis.xread({keys.queue(model): cursor}, count=1, block=max(1, min(timeout_ms, BLOCK_MS)))

    @reachable
    async def heartbeat(self, model: str, worker: str, entries: Sequence[str]) -> list[str]:
        """Renew leases; returns the entries that belong to somebody else by now."""
        if not entries:
            return []
        lost = await self._heartbeat(keys=[keys.queue(model)], args=[keys.GROUP, worker, *entries])
        return [entry.decode() for entry in lost]

    @reachable
    async def finish(self, model: str, delivery: Delivery, result: Result, ttl_s: int) -> bool:
        """Write the result and close the entry; False when another was written before, or when a failure comes
        from a worker that lost the job to another, which goes on with it."""
        return await self._close(model, delivery.job.id, delivery.entry, delivery.attempt, result, ttl_s)

    async def _close(self, model: str, job_id: str, entry: str, attempt: str, result: Result, ttl_s: int) -> bool:
        stored = await self._finish(
            keys=[
                keys.queue(model),
                keys.job(model, job_id),
                keys.result(model, job_id),
                keys.backlog(model),
                keys.ledger(model),
            ],
            args=[keys.GROUP, entry, result.outcome, encode(result), ttl_s, attempt],
        )
        return bool(stored)

    @reachable
    async def notify(self, reply_to: str, job_id: str, status: str) -> None:
        """Wake the gateway that waits for a job."""
        stream = keys.reply(reply_to)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xadd(stream, {"id": job_id, "status": status}, maxlen=REPLIES_KEPT, approximate=True)
            pipe.expire(stream, REPLY_TTL_S)
            await pipe.execute()

    @reachable
    async def announce(self, worker: str, infos: Iterable[ModelInfo], rates: dict[str, float]) -> None:
        """Advertise models, give a sign of life, and publish measured drain rates (cost per second)."""
        now = await self._now_ms()
        for info in infos:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hset(keys.CATALOGUE, info.name, encode(info))
                pipe.zremrangebyscore(keys.workers(info.name), "-inf", now - ADVERTISED_MS)
                pipe.zadd(keys.workers(info.name), {worker: now})
                pipe.expire(keys.workers(info.name), ADVERTISED_MS // 1000)
                pipe.hset(keys.rates(info.name), worker, f"{rates.get(info.name, 0.0):.6g}")
                pipe.expire(keys.rates(info.name), ADVERTISED_MS // 1000)
                await pipe.execute()

    @reachable
    async def retire(self, worker: str, models: Iterable[str]) -> None:
        """Stop being counted; pending entries stay and are redelivered."""
        for model in models:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zadd(keys.workers(model), {worker: 0}, xx=True)
                pipe.hdel(keys.rates(model), worker)
                await pipe.execute()

    async def _live(self, model: str) -> list[bytes]:
        oldest = await self._now_ms() - ALIVE_MS
        found: list[Any] = await self._redis.zrangebyscore(keys.workers(model), oldest, "+inf")
        return found

    async def _now_ms(self) -> int:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


def _bytes(value: bytes | str) -> bytes:
    """What a client that decodes nothing answers."""
    return value if isinstance(value, bytes) else value.encode()


def _entries(found: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries of a one-stream XREAD answer; none when it timed out."""
    return [(entry, fields) for _, entries in found or [] for entry, fields in entries]
