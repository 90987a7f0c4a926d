"""From what an engine finished to results in the store and gateways that are awake."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from service.broker.jobs import Wake
from service.broker.redis_streams import Broker
from service.config import Settings
from service.metrics import WorkerMetrics
from service.protocol import Delivery, GenerateJob, Result
from service.worker.outcomes import Finished
from service.worker.patience import AWAY, Backoff
from service.worker.results import failed_result, record, to_result

NOTIFY_S = 20.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Answering:
    """One model's answers. After `give_up_at` (monotonic seconds) nothing is tried again."""

    def __init__(self, model: str, broker: Broker, worker: str, settings: Settings, metrics: WorkerMetrics) -> None:
        self.give_up_at = float("inf")
        self._model, self._broker, self._worker, self._settings = model, broker, worker, settings
        self._metrics = metrics

    async def store(self, over: Sequence[Finished], useful_until: Callable[[Delivery], float]) -> list[Wake]:
        """Encode and store the answers of a tick; whom to wake for those that count.

        An answer that the store does not take is tried again until `useful_until` (monotonic seconds).
        """
        if any(isinstance(done.delivery.job, GenerateJob) for done in over):
            results = await asyncio.to_thread(self._encode, over)
        else:
            results = self._encode(over)
        pairs = [(done.delivery, result) for done, result in zip(over, results, strict=True)]
        try:
            wakes: Sequence[Wake | None] = await self._broker.finish_all(
                self._model, pairs, self._settings.result_ttl_s
            )
        except AWAY:
            wakes = await asyncio.gather(*(self._patiently(*pair, useful_until(pair[0])) for pair in pairs))
        for done, result, wake in zip(over, results, wakes, strict=True):
            fields = {"model": self._model, "job": result.id, "outcome": result.outcome, "run_s": result.run_s}
            log.info("job finished" if wake else "answer not needed, or left to redelivery", extra=fields)
            if wake:
                record(self._metrics, self._model, result, done)
        return [wake for wake in wakes if wake]

    def _encode(self, over: Sequence[Finished]) -> list[Result]:
        return [self._encoded(done) for done in over]

    def _encoded(self, done: Finished) -> Result:
        try:
            return to_result(done, self._worker, self._settings.max_result_bytes)
        except Exception as error:
            log.exception("answer cannot be encoded", extra={"model": self._model, "job": done.delivery.job.id})
            return failed_result(done, self._worker, f"encode: {type(error).__name__}: {error}")

    async def _patiently(self, delivery: Delivery, result: Result, useful_until: float) -> Wake | None:
        with suppress(*AWAY):
            return await self._retry(
                "finishing a job",
                lambda: self._broker.finish(self._model, delivery, result, self._settings.result_ttl_s),
                useful_until,
            )
        return None

    async def wake(self, wakes: Sequence[Wake]) -> None:
        """Wake gateways; they look by themselves every few seconds, so giving up costs delay only."""
        with suppress(*AWAY):
            await self._retry("waking a gateway", lambda: self._broker.notify(wakes), time.monotonic() + NOTIFY_S)

    async def _retry(self, what: str, call: Callable[[], Awaitable[T]], until: float) -> T:
        """`call` until it works; its last error once `until` or `give_up_at` has passed."""
        backoff = Backoff(what)
        while True:
            try:
                value = await call()
            except AWAY as error:
                if time.monotonic() >= min(until, self.give_up_at):
                    raise
                await asyncio.sleep(backoff.failed(error))
            else:
                backoff.worked()
                return value
