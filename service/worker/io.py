"""The io thread: an asyncio loop that owns the Broker and one Lane per model; the engines never wait for Redis."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from service.broker.redis_streams import Broker
from service.config import Settings
from service.loops import new_event_loop
from service.metrics import WorkerMetrics
from service.worker.engine import Engine, Tick
from service.worker.lane import Lane
from service.worker.patience import AWAY, Backoff, wanted
from service.worker.quarantine import Quarantine

ANNOUNCE_S = 2.0
SOON_S = 0.2
log = logging.getLogger(__name__)


class WorkerIO:
    """Start it, `report` what the engines finish, `drain` it; it ends by itself when nothing is in hand.

    A broken loop ends the thread at once and leaves its exception in `error`: entries are redelivered.
    """

    def __init__(
        self,
        url: str,
        worker: str,
        engines: Sequence[Engine],
        settings: Settings,
        metrics: WorkerMetrics,
        wake: Callable[[], None],
    ) -> None:
        self.error: BaseException | None = None
        self._url, self._worker, self._settings, self._metrics, self._wake = url, worker, settings, metrics, wake
        self._engines = engines
        self._lanes: dict[str, Lane] = {}
        self._loop = new_event_loop()
        self._draining = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)

    def start(self) -> None:
        """Begin to take work; Redis may come later."""
        self._thread.start()

    def alive(self) -> bool:
        """False once drained or broken."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end."""
        self._thread.join(timeout)

    def report(self, engine: Engine, tick: Tick) -> None:
        """Tell of a tick: jobs that are over or came further, slots that may have become free. From any thread."""
        self._call(self._on_report, engine.name, tick)

    def drain(self) -> None:
        """Take no more; finish what is in hand, then end. From any thread."""
        self._call(self._draining.set)

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended: entries are left to redelivery
            self._loop.call_soon_threadsafe(function, *args)

    def _on_report(self, model: str, tick: Tick) -> None:
        lane = self._lanes[model]
        lane.ticked()
        if tick.finished:
            self._group.create_task(lane.finish(tick.finished))
        for progress in tick.progress:
            self._group.create_task(lane.keep(progress))
        for progress in tick.suspended:
            self._group.create_task(lane.release(progress))

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            self.error = error
        finally:
            self._wake()

    async def _main(self) -> None:
        broker = Broker(self._url)
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._serve(broker)
        finally:
            with suppress(*AWAY):
                await broker.aclose()

    async def _serve(self, broker: Broker) -> None:
        shared = (self._worker, self._settings, self._metrics, self._wake, self._group.create_task, Quarantine())
        self._lanes |= {engine.name: Lane(engine, broker, *shared) for engine in self._engines}
        lanes = list(self._lanes.values())
        announcing = self._group.create_task(self._announce(broker))
        beating = [self._group.create_task(lane.beat()) for lane in lanes]
        taking = [self._group.create_task(lane.take()) for lane in lanes]
        listening = self._group.create_task(self._listen(broker))
        await self._draining.wait()
        for lane in lanes:
            lane.drain()
        announcing.cancel()
        await asyncio.wait([announcing, *taking])
        with suppress(*AWAY):
            await broker.retire(self._worker, list(self._lanes))
        await self._settle(lanes)
        for task in (*beating, listening):
            task.cancel()

    async def _settle(self, lanes: Sequence[Lane]) -> None:
        """Until nothing is in hand; what runs longer than `drain_s` is handed back, its rows saved."""
        settled = asyncio.gather(*(lane.settled() for lane in lanes))
        done, _ = await asyncio.wait([settled], timeout=self._settings.drain_s)
        if not done:
            for lane in lanes:
                lane.engine.suspend()
            self._wake()
            await asyncio.wait([settled], timeout=self._settings.lease_s)
            for lane in lanes:
                lane.abandon()
            await settled

    async def _listen(self, broker: Broker) -> None:
        """Hear of cancelled jobs."""
        backoff, last = Backoff("listening for cancellations"), "0"
        while wanted():
            try:
                told, last = await broker.controls(self._worker, last)
            except AWAY as error:
                await asyncio.sleep(backoff.failed(error))
            else:
                backoff.worked()
                for model, handle in told:
                    if lane := self._lanes.get(model):
                        lane.cancelled(handle)

    async def _announce(self, broker: Broker) -> None:
        """Say every two seconds what is served and how fast it drains; a stalled engine is not advertised."""
        backoff = Backoff("announcing")
        while wanted():
            live = [lane.engine for lane in self._lanes.values() if lane.ready and not lane.stalled]
            rates = {engine.name: (engine.rate.per_second(), engine.admission_rate()) for engine in live}
            try:
                await broker.announce(self._worker, [engine.task.info for engine in live], rates)
            except AWAY as error:
                await asyncio.sleep(backoff.failed(error))
            else:
                backoff.worked()
                await self._until_news(ANNOUNCE_S if len(live) == len(self._lanes) else SOON_S)

    async def _until_news(self, seconds: float) -> None:
        """Sleep, but say sooner that a lane has come under pressure, or out of it."""
        before = [lane.engine.admission_rate() > 0 for lane in self._lanes.values()]
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(SOON_S, left))
            if before != [lane.engine.admission_rate() > 0 for lane in self._lanes.values()]:
                return
