"""One model's road between Redis and its engine: take, heartbeat, finish. Lives on the io thread's loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from service.broker.redis_streams import Broker
from service.config import Settings
from service.metrics import WorkerMetrics
from service.protocol import Delivery
from service.worker.answering import Answering
from service.worker.engine import Engine, Finished, Progress
from service.worker.gears import Queue
from service.worker.patience import AWAY, Backoff, wanted
from service.worker.quarantine import Quarantine
from service.worker.results import told

WAIT_MS = 1000
STEP_BACK_S = 0.03
LEAD_S = 0.004  # at least; a take, and what else the machine has to do
LEAD_TAKES = 2.0
RECLAIM_S = 1.0
log = logging.getLogger(__name__)


@dataclass
class Held:
    """A job in hand: until when (this machine's monotonic seconds) its answer is worth retrying, whether a checkpoint
    is on its way, and that it was put down."""

    delivery: Delivery
    useful_until: float
    saving: bool = False
    down: asyncio.Event = field(default_factory=asyncio.Event)


def step_back_s(engine: Engine) -> float:
    """How long one of several workers waits before it takes: an entry wakes them all, and those with fewer rows in hand
    come first. Less than half a tick."""
    rows = engine.capacity - engine.free_rows()
    return min(STEP_BACK_S, engine.rate.pace().ms_per_tick / 2000 * rows / (rows + 4))


class Lane:
    """Jobs of one model in this worker's hands, keyed by stream entry."""

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        worker: str,
        settings: Settings,
        metrics: WorkerMetrics,
        wake: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        quarantine: Quarantine,
    ) -> None:
        self.engine, self.model = engine, engine.name
        self.hand: dict[str, Held] = {}
        self.room, self.tick_over = asyncio.Event(), asyncio.Event()
        self.draining = asyncio.Event()
        self.ready, self.stalled = False, False
        self._broker, self._worker, self._settings, self._metrics = broker, worker, settings, metrics
        self._wake, self._spawn, self._quarantine = wake, spawn, quarantine
        quarantine.lanes.append(self)
        self._put_down_one = asyncio.Event()
        self._ticks_seen, self._was_busy = -1, False
        self._free_seen, self._alone_in_hand = 0, False
        self._reclaim_at, self._take_s = 0.0, 0.0
        self._answering = Answering(self.model, broker, worker, settings, metrics)

    def drain(self) -> None:
        """Take no more. Answers that Redis does not accept within a lease are left to redelivery."""
        self._answering.give_up_at = time.monotonic() + self._settings.lease_s
        self.draining.set()
        self.room.set()

    def ticked(self) -> None:
        """The engine made a tick, so it is not stalled: look for work again if that made room, or the next one will."""
        self.stalled = False
        self.tick_over.set()
        self._look_for_room()
        self._look_again()

    def _look_for_room(self) -> None:
        if self.engine.free_rows() > self._free_seen:
            self.room.set()

    def _look_again(self) -> None:
        """Shortly before the next tick ends: what is taken then for rows that end with it follows on at once."""
        if (pause_s := self._hold_s()) > 0:
            asyncio.get_running_loop().call_later(pause_s, self._look_for_room)

    def _hold_s(self) -> float:
        """How long what was queued while a tick runs may lie: nothing enters before the next one, which gets it all in
        one take; 0 while the engine rests."""
        return max(0.0, self.engine.until_next_s() - max(LEAD_S, LEAD_TAKES * self._take_s))

    def abandon(self) -> None:
        """Leave what is in hand to redelivery."""
        for held in list(self.hand.values()):
            self._put_down(held.delivery)

    async def settled(self) -> None:
        """Return when nothing is in hand."""
        while self.hand:
            self._put_down_one.clear()
            await self._put_down_one.wait()

    async def take(self) -> None:
        """Take exactly as many rows as there are slots free, or about to be, until drained."""
        backoff = Backoff(f"taking {self.model} jobs")
        while wanted() and not self.draining.is_set():
            self.room.clear()
            free = self._free_seen = self.engine.free_rows()
            if self.stalled or self._alone_in_hand or self._quarantine.forbids(self):
                await self._for_room()
                continue
            try:
                await self._turn(free)
            except AWAY as error:
                self.ready = False
                await asyncio.sleep(backoff.failed(error))
            else:
                backoff.worked()

    async def _turn(self, free: int) -> None:
        """Take what fits, then wait for room or for more."""
        if not self.ready:
            await self._open()
        settings, now = self._settings, time.monotonic()
        reclaim = now >= self._reclaim_at
        taken = await self._broker.take(
            self.model,
            self._worker,
            free,
            self.engine.capacity,
            int(settings.lease_s * 1000),
            settings.max_deliveries,
            settings.result_ttl_s,
            reclaim,
        )
        self._take_s = time.monotonic() - now
        if reclaim and free and not taken.lapsed:
            self._reclaim_at = now + RECLAIM_S
        self._free_seen = max(0, free - sum(delivery.job.work.rows for delivery in taken.deliveries))
        self.engine.pressed = taken.full or not self._free_seen
        waits = taken.backlog if self.engine.pressed else 0  # with room left nothing waits, whatever runs elsewhere
        self.engine.gears.queue = Queue(waits, taken.asked, max(1, taken.workers))
        self._offer([held for delivery in taken.deliveries if (held := self._receive(delivery))])
        for wake, outcome in taken.ended:
            self._metrics.outcomes.labels(self.model, outcome).inc()
            if outcome == "expired":
                self._metrics.deadline_missed.labels(self.model, "waiting").inc()
            self._spawn(self._answering.wake([wake]))
        if taken.full or not self._free_seen:
            await self._for_room()
        else:
            await self._broker.wait(self.model, taken.cursors, WAIT_MS)
            back_s = step_back_s(self.engine) if taken.workers > 1 else 0.0
            if (pause_s := max(self._hold_s(), back_s)) > 0:
                self.tick_over.clear()
                await self._for(self.tick_over, pause_s)

    async def _for_room(self) -> None:
        """Wait for room or the drain, a second at most."""
        await self._for(self.room, WAIT_MS / 1000)

    async def _for(self, event: asyncio.Event, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    async def _open(self) -> None:
        """Before the first take and after an outage: a fit server, a group, and our leases renewed before we look."""
        await self._broker.check()
        await self._broker.ensure(self.model)
        await self._renew()
        self.ready, self._reclaim_at = True, 0.0

    def _receive(self, delivery: Delivery) -> Held | None:
        """A job is in hand; returned when it is for the engine at once."""
        if earlier := self.hand.get(delivery.entry):
            self._put_down(earlier.delivery)
            self.engine.withdraw([earlier.delivery.attempt])
        left_s = (delivery.deadline_ms - delivery.taken_ms) / 1000
        held = Held(delivery, time.monotonic() + max(0.0, left_s) + self._settings.lease_s)
        self.hand[delivery.entry] = held
        if delivery.solo:
            self._alone_in_hand = True
            self._spawn(self._alone(held))
        elif self._quarantine.forbids(self):
            self._spawn(self._afterwards(held))
        else:
            return held
        return None

    def _offer(self, jobs: Sequence[Held]) -> None:
        """Give the engine what is still in hand, all at once: its next tick has all of it."""
        if kept := [held.delivery for held in jobs if self.hand.get(held.delivery.entry) is held]:
            self.engine.offer(*kept)
            self._wake()
            self._look_again()

    async def _alone(self, held: Held) -> None:
        """Run a job that may have killed its workers, with nothing else in this process, once the answers are stored of
        all that this lane had."""
        for other in [other for other in self.hand.values() if other is not held]:
            await other.down.wait()
        async with self._quarantine.held(self):
            self._offer([held])
            await held.down.wait()
        self._alone_in_hand = False
        self.room.set()

    async def _afterwards(self, held: Held) -> None:
        """Run a job that was taken while another lane's ran alone."""
        async with self._quarantine.lock:
            self._offer([held])

    async def beat(self) -> None:
        """Renew leases every third of one, but only while ticks progress: a hung engine loses its jobs."""
        backoff = Backoff(f"heartbeat of {self.model} jobs")
        while wanted():
            await asyncio.sleep(self._settings.lease_s / 3)
            self._look_at_engine()
            try:
                await self._renew()
            except AWAY as error:
                backoff.failed(error)
            else:
                backoff.worked()

    async def _renew(self) -> None:
        asked = dict(self.hand)
        if asked and not self.stalled:
            lost = await self._broker.heartbeat(self.model, self._worker, list(asked))
            self._lose([asked[entry].delivery for entry in lost])

    def _look_at_engine(self) -> None:
        ticks, busy = self.engine.ticks, not self.engine.idle()
        stalled = busy and self._was_busy and ticks == self._ticks_seen
        if stalled != self.stalled:
            log.log(
                logging.ERROR if stalled else logging.INFO,
                "no tick since the last heartbeat, leases lapse" if stalled else "ticks progress again",
                extra={"model": self.model, "jobs": len(self.hand)},
            )
        self._ticks_seen, self._was_busy, self.stalled = ticks, busy, stalled

    def _lose(self, deliveries: list[Delivery]) -> None:
        """Drop jobs whose lease went to somebody else; one that was finished meanwhile is no loss."""
        lost = [d for d in deliveries if self._put_down(d)]
        if lost:
            self._metrics.leases_lost.labels(self.model).inc(len(lost))
            log.warning("leases lost", extra={"model": self.model, "jobs": [d.job.id for d in lost]})
            self.engine.withdraw([d.attempt for d in lost])

    def _put_down(self, delivery: Delivery) -> bool:
        held = self.hand.get(delivery.entry)
        if held is None or held.delivery is not delivery:
            return False
        self.hand.pop(delivery.entry).down.set()
        self._put_down_one.set()
        return True

    def cancelled(self, handle: str) -> None:
        """Somebody cancelled a job: let it go at the next tick."""
        if held := self.hand.get(handle):
            self._put_down(held.delivery)
            self.engine.withdraw([held.delivery.attempt])
            self._metrics.outcomes.labels(self.model, "cancelled").inc()
            self._wake()

    async def keep(self, progress: Progress) -> None:
        """Save a job's rows and tell its followers; one at a time, the next tick's are as good."""
        held = self.hand.get(progress.delivery.entry)
        if held is None or held.saving:
            return
        held.saving = True
        try:
            await self._checkpoint(progress)
        except AWAY as error:
            log.warning("checkpoint failed", extra={"model": self.model, "error": str(error)})
        finally:
            held.saving = False

    async def _checkpoint(self, progress: Progress) -> None:
        most, delivery = self._settings.checkpoint_max_bytes, progress.delivery
        states = {index: state for index, state in progress.states.items() if len(state) <= most}
        news = await self._news(progress) if delivery.events else (b"", b"")
        ttl_s = max(1, (delivery.deadline_ms - delivery.taken_ms) // 1000) + self._settings.result_ttl_s
        mine = await self._broker.checkpoint(self.model, delivery, states, progress.done, progress.of, ttl_s, *news)
        if mine:
            self._metrics.checkpoints.labels(self.model).inc(len(states))
        else:
            self._lose([delivery])

    async def _news(self, progress: Progress) -> tuple[bytes, bytes]:
        try:
            return await asyncio.to_thread(told, progress)
        except Exception:
            log.exception("followers are not told", extra={"model": self.model, "job": progress.delivery.job.id})
            return b"", b""

    async def release(self, progress: Progress) -> None:
        """Hand a job back with its rows as they are, for another worker to go on with."""
        try:
            await self._checkpoint(progress)
            await self._broker.release(self.model, self._worker, progress.delivery)
        except AWAY as error:
            log.warning("left to redelivery", extra={"model": self.model, "error": str(error)})
        self._put_down(progress.delivery)

    async def finish(self, over: Sequence[Finished]) -> None:
        """Store the answers of a tick, put the jobs down, wake their gateways."""
        await self._answering.answer(over, self._useful_until, self._put_down)

    def _useful_until(self, delivery: Delivery) -> float:
        held = self.hand.get(delivery.entry)
        return held.useful_until if held else time.monotonic() + self._settings.lease_s
