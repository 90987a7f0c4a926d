"""The broker: jobs wait in Redis streams, one a model and rank, under leases, until one result is written.

At-least-once execution, exactly-once visible result. Every script touches the keys of one model, that is
one slot. Lease = pending entry of the consumer group; its idle time is the time since the last heartbeat.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from models.api import ModelInfo
from service.broker import keys
from service.broker.connection import BLOCK_MS, reachable
from service.broker.hooks import Hooks
from service.broker.jobs import Wake
from service.broker.store import ALIVE_MS, as_bytes
from service.broker.submission import Submission
from service.broker.together import Together
from service.errors import DeadlineExceeded, JobFailed, NoWorker, OfframpError, QueueFull, QuotaExceeded
from service.protocol import Delivery, Failure, Job, Outcome, Result, Terms, decode, decode_info, decode_job, encode

ADVERTISED_MS = 60_000
UNREADABLE_TTL_S = 600
START = ("0-0", "0-0", "0-0")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """A job that is queued: the handle of its entry; `attached` when it was there already.

    `foreseen_ms`: until it is done, by what is ahead and the workers' rate; 0 where either is nothing or unknown.
    """

    entry: str
    attached: bool = False
    foreseen_ms: int = 0


@dataclass(frozen=True)
class Taken:
    """What a worker got; `full` when the next job did not fit; `cursors` are where `wait` goes on, one a rank.

    `ended`: jobs that ended instead, with their outcomes; `lapsed` when what did not fit is a job whose lease ran out;
    `backlog`: cost queued and running; `asked`: cost ever asked for, refused work included; `workers`: live ones.
    """

    deliveries: list[Delivery]
    full: bool = False
    cursors: Sequence[str] = START
    ended: Sequence[tuple[Wake, Outcome]] = ()
    lapsed: bool = False
    backlog: int = 0
    asked: int = 0
    workers: int = 0


@dataclass(frozen=True)
class QueueStats:
    """A model's queue: jobs waiting or running, their cost, the ledger, dead letters, live workers."""

    jobs: int
    backlog: int
    ledger: dict[str, int]
    letters: int
    workers: int


class Broker(Hooks):
    """One process's connection to the queue."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._submit = Together[Submission, Any](self._submit_all)

    # gateway side

    @reachable
    async def submit(self, job: Job, terms: Terms) -> Submitted:
        """Queue a job, or attach to the one of the same id.

        Raises:
            QueueFull: the backlog would pass its budget.
            QuotaExceeded: what the owner has queued and running would.
            DeadlineExceeded: at the workers' rate what is ahead drains too late.
            NoWorker: nobody serves the model.
        """
        verdict, handle, waiting, rate, foreseen_ms = await self._submit(
            Submission(job, encode(job), terms, time.monotonic())
        )
        if (said := verdict.decode()) in ("accepted", "attached"):
            return Submitted(handle.decode(), said == "attached", foreseen_ms)
        raise await self._refusal(said, job, terms, int(waiting), float(rate), foreseen_ms)

    async def _submit_all(self, waiting: Sequence[Submission]) -> list[Any]:
        now = time.monotonic()
        return await self._scripts("submit", [one.call(now) for one in waiting])

    async def _refusal(
        self, verdict: str, job: Job, terms: Terms, waiting: int, rate: float, foreseen_ms: int
    ) -> OfframpError:
        model = job.work.model
        if verdict == "idle":
            return NoWorker(f"no live worker serves {model!r} now", field="model")
        if verdict == "late":
            late = f"{model!r} has {waiting} of work ahead, {waiting / rate:.1f} s at its rate"
            error = DeadlineExceeded(f"the deadline cannot be met: {late}", field="deadline_ms")
            error.foreseen_ms = foreseen_ms
            return error
        limit = terms.max_owed if verdict == "owed" else terms.max_backlog
        wait = await self._drain_s(model, waiting + job.cost - limit)
        if verdict == "owed":
            return QuotaExceeded(f"{waiting} of {terms.max_owed} queued and running on {model!r}", retry_after_s=wait)
        return QueueFull(f"{model!r} has a backlog of {waiting} of {terms.max_backlog}", retry_after_s=wait)

    async def _drain_s(self, model: str, cost: int) -> int:
        """Seconds until `cost` has drained at the live workers' measured rates, 1..60; 5 where none is known."""
        live = set(await self._live(model))
        rates = await self._redis.hgetall(keys.rates(model))
        rate = sum(float(value) for worker, value in rates.items() if worker in live)
        return 5 if rate <= 0 else max(1, min(60, math.ceil(cost / rate)))

    @reachable
    async def replies(self, gateway: str, after: str) -> tuple[list[tuple[str, Result | None]], str]:
        """Jobs that ended past `after`, with results that are small, waiting up to a second; and the last id seen."""
        found = await self._read("replies", BLOCK_MS, 500, {keys.reply(gateway): after})
        wakes = [(fields[b"id"].decode(), _inline(fields.get(b"result", b""))) for _, fields in found]
        return wakes, found[-1][0].decode() if found else after

    @reachable
    async def catalogue(self) -> dict[str, ModelInfo]:
        """Every model by name that a worker advertised within the last minute."""
        raw = await self._redis.hgetall(keys.CATALOGUE)
        infos = [decode_info(as_bytes(value)) for _, value in sorted(raw.items())]
        return {info.name: info for info in infos if await self._redis.exists(keys.workers(info.name))}

    @reachable
    async def info(self, model: str) -> ModelInfo | None:
        """What was last advertised of a model, whether or not a worker lives."""
        raw = await self._redis.hget(keys.CATALOGUE, model)
        return None if raw is None else decode_info(as_bytes(raw))

    @reachable
    async def live_workers(self, model: str) -> int:
        """Workers of `model` that gave a sign of life lately."""
        return len(await self._live(model))

    @reachable
    async def queue_stats(self, model: str) -> QueueStats:
        """Numbers for gauges, read at scrape."""
        async with self._redis.pipeline(transaction=True) as pipe:  # of one moment: the ledger has to balance
            pipe.hgetall(keys.ledger(model))
            pipe.hvals(keys.backlog(model))
            pipe.xlen(keys.letters(model))
            for rank in keys.RANKS:
                pipe.xlen(keys.queue(model, rank))
            ledger, backlog, letters, *jobs = await pipe.execute()
        counts = {name.decode(): int(count) for name, count in ledger.items()}
        costs = sum(int(cost) for cost in backlog)
        return QueueStats(sum(jobs), costs, counts, int(letters), await self.live_workers(model))

    # worker side

    @reachable
    async def ensure(self, model: str) -> None:
        """Create the consumer groups at the start of the streams, so that no backlog is missed."""
        for rank in keys.RANKS:
            try:
                await self._redis.xgroup_create(keys.queue(model, rank), keys.GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    @reachable
    async def take(
        self,
        model: str,
        worker: str,
        free_rows: int,
        capacity: int,
        lease_ms: int,
        max_deliveries: int = 5,
        ttl_s: int = UNREADABLE_TTL_S,
        reclaim: bool = True,
    ) -> Taken:
        """Take jobs that fit `free_rows` of `capacity` slots; leases idle for `lease_ms` come first.

        Without `reclaim` such leases are not looked for, which takes the server longer the more are held.
        Jobs that are out of time, or were delivered `max_deliveries` times, end here; `ttl_s` keeps their results.
        """
        args = (worker, free_rows, capacity, lease_ms, self._token, max_deliveries, ttl_s, int(reclaim), ALIVE_MS)
        take = partial(self._script, "take", keys.prefix(model), *args, command=self._own(model))
        try:
            full, cursors, rows, ended, seen = await take()
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.ensure(model)
            full, cursors, rows, ended, seen = await take()
        deliveries = [delivery for row in rows if (delivery := await self._open(model, row))]
        over = [
            (Wake(tuple(gateways.decode().split()), name.decode()), outcome.decode())
            for name, outcome, gateways in ended
        ]
        return Taken(deliveries, bool(full), [cursor.decode() for cursor in cursors], over, full == 2, *seen)

    async def _open(self, model: str, row: Sequence[Any]) -> Delivery | None:
        """The delivery of a row of take.lua; a job that cannot be read ends here as failed."""
        job_id, entry, deliveries, now, attempt, payload, submitted, deadline, solo, events, states = row
        handle, token = entry.decode(), attempt.decode()
        try:
            return Delivery(
                job=decode_job(payload),
                entry=handle,
                attempt=token,
                deliveries=int(deliveries),
                submitted_ms=int(submitted),
                deadline_ms=int(deadline),
                taken_ms=int(now),
                solo=bool(solo),
                events=bool(events),
                states={int(i): as_bytes(state) for i, state in zip(states[::2], states[1::2], strict=True)},
            )
        except msgspec.DecodeError as error:
            log.error("job %s of %s cannot be read: %s", job_id.decode(), model, error)
        failure = Failure(JobFailed.code, "the worker could not read the job: gateway and worker differ in version?")
        result = Result(job_id.decode(), "failed", failure=failure)
        await self._close(model, handle, token, result, UNREADABLE_TTL_S)
        return None

    @reachable
    async def wait(self, model: str, cursors: Sequence[str], timeout_ms: int) -> None:
        """Return when a rank has an entry past its cursor or after `timeout_ms`, a second at most; claims nothing."""
        streams = {keys.queue(model, rank): cursor for rank, cursor in zip(keys.RANKS, cursors, strict=True)}
        await self._read(model, timeout_ms, 1, streams)

    @reachable
    async def heartbeat(self, model: str, worker: str, handles: Sequence[str]) -> list[str]:
        """Renew leases; returns the entries that belong to somebody else by now."""
        if not handles:
            return []
        return [entry.decode() for entry in await self._run("heartbeat", model, worker, *handles)]

    @reachable
    async def finish(self, model: str, delivery: Delivery, result: Result, ttl_s: int) -> Wake | None:
        """Write the result and close the entry; returns whom to wake.

        None when another result was written before, or when a failure comes from a worker that lost the job to
        another, which goes on with it.
        """
        return await self._close(model, delivery.entry, delivery.attempt, result, ttl_s)

    @reachable
    async def finish_all(self, model: str, over: Sequence[tuple[Delivery, Result]], ttl_s: int) -> list[Wake | None]:
        """`finish` for several jobs in one round trip."""
        if len(over) == 1:
            return [await self.finish(model, *over[0], ttl_s)]
        raw = [encode(result) for _, result in over]
        calls = [
            (model, (result.id, delivery.entry, result.outcome, data, ttl_s, delivery.attempt))
            for (delivery, result), data in zip(over, raw, strict=True)
        ]
        answers = await self._scripts("finish", calls)
        return [
            await self.finish(model, delivery, result, ttl_s)
            if isinstance(answer, Exception)
            else _wake(answer, result.id, data)
            for (delivery, result), data, answer in zip(over, raw, answers, strict=True)
        ]

    async def _close(self, model: str, handle: str, attempt: str, result: Result, ttl_s: int) -> Wake | None:
        raw = encode(result)
        answer = await self._run("finish", model, result.id, handle, result.outcome, raw, ttl_s, attempt)
        return _wake(answer, result.id, raw)

    @reachable
    async def checkpoint(
        self,
        model: str,
        delivery: Delivery,
        states: Mapping[int, bytes],
        done: int,
        of: int,
        ttl_s: int,
        progress: bytes = b"",
        preview: bytes = b"",
    ) -> bool:
        """Keep saved rows and how far the job is, and tell its followers; False when it is no longer this attempt's."""
        flat = [value for pair in states.items() for value in pair]
        args = (delivery.job.id, delivery.attempt, ttl_s, done, of, progress, preview, *flat)
        return bool(await self._run("checkpoint", model, *args))

    @reachable
    async def release(self, model: str, worker: str, delivery: Delivery) -> bool:
        """Give a lease back, for anybody to take at once; the delivery does not count. False when it was lost."""
        args = (worker, delivery.entry, delivery.attempt, delivery.job.id)
        return bool(await self._run("release", model, *args))

    @reachable
    async def controls(self, worker: str, after: str) -> tuple[list[tuple[str, str]], str]:
        """Cancelled entries (model, handle) past `after`, waiting up to a second; and the last id seen."""
        found = await self._read("controls", BLOCK_MS, 500, {keys.control(worker): after})
        told = [(fields[b"model"].decode(), fields[b"entry"].decode()) for _, fields in found]
        return told, found[-1][0].decode() if found else after

    @reachable
    async def announce(self, worker: str, infos: Iterable[ModelInfo], rates: Mapping[str, tuple[float, float]]) -> None:
        """Advertise models, give a sign of life, and publish (rate, rate under pressure), cost per second."""
        now = await self._now_ms()
        for info in infos:
            rate, pressed = rates.get(info.name, (0.0, 0.0))
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hset(keys.CATALOGUE, info.name, encode(info))
                pipe.zremrangebyscore(keys.workers(info.name), "-inf", now - ADVERTISED_MS)
                pipe.zadd(keys.workers(info.name), {worker: now})
                pipe.expire(keys.workers(info.name), ADVERTISED_MS // 1000)
                for key, value in ((keys.rates(info.name), rate), (keys.pressed(info.name), pressed)):
                    pipe.hset(key, worker, f"{value:.6g}")
                    pipe.expire(key, ADVERTISED_MS // 1000)
                await pipe.execute()

    @reachable
    async def retire(self, worker: str, models: Iterable[str]) -> None:
        """Stop being counted; pending entries stay and are redelivered."""
        for model in models:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zadd(keys.workers(model), {worker: 0}, xx=True)
                pipe.hdel(keys.rates(model), worker)
                pipe.hdel(keys.pressed(model), worker)
                await pipe.execute()


def _wake(answer: Any, job_id: str, result: bytes) -> Wake | None:
    won, gateways = answer
    return Wake(tuple(gateways.decode().split()), job_id, result) if won else None


def _inline(raw: bytes) -> Result | None:
    """A result that came with its wake-up; None where it did not, or cannot be read here: the key has it too."""
    try:
        return decode(Result, as_bytes(raw)) if raw else None
    except msgspec.DecodeError:
        return None
