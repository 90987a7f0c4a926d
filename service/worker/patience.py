"""What the io side does while Redis is away."""

from __future__ import annotations

import asyncio
import logging
import random

from redis.exceptions import RedisError

from service.errors import OfframpError

AWAY = (RedisError, OSError, OfframpError)
BACKOFF_S = (0.05, 2.0)
log = logging.getLogger(__name__)


def wanted() -> bool:
    """False once the current task was cancelled: on Python 3.11 a wait inside redis-py may swallow that."""
    task = asyncio.current_task()
    return task is None or not task.cancelling()


class Backoff:
    """Pauses that double from 50 ms to 2 s, jittered; says so in the log at the first and at the end."""

    def __init__(self, what: str) -> None:
        self._what, self._pause = what, 0.0

    def failed(self, error: Exception) -> float:
        """Seconds to pause after one more failure."""
        if not self._pause:
            log.warning("%s failed, retrying", self._what, extra={"error": f"{type(error).__name__}: {error}"})
        self._pause = min(max(2 * self._pause, BACKOFF_S[0]), BACKOFF_S[1])
        return self._pause * random.uniform(0.5, 1.0)

    def worked(self) -> None:
        """Begin again at the shortest pause."""
        if self._pause:
            log.info("%s works again", self._what)
        self._pause = 0.0
