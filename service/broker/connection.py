"""A connection to Redis or Valkey: how it is opened, what counts as an outage, which servers are refused."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import Unavailable, UnfitStore

BLOCK_MS = 1_000
READ_S = BLOCK_MS / 1000 + 4.0
CONNECTIONS = 64
OUTAGES = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError, NoPermissionError)
OUTAGE_CODES = ("LOADING", "MASTERDOWN", "MISCONF", "BUSY ", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")
IN_SCRIPT = re.compile(r"@user_script: \d+: -(OOM|READONLY|NOPERM|MISCONF|NOREPLICAS|MASTERDOWN) ")  # Redis 6.2
NEEDED = ("evalsha", "script", "xautoclaim", "xclaim", "xpending", "xreadgroup", "xinfo", "xgroup", "zrangebyscore")

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def connect(url: str) -> Redis:
    """A client of the server at `url`; callers beyond `CONNECTIONS` wait for their turn.

    Reads last longer than any block (`BLOCK_MS`), whatever the URL says.
    """
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url,
        protocol=2,
        max_connections=CONNECTIONS,
        timeout=READ_S,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 1),
        health_check_interval=30,
    )
    pool.connection_kwargs["socket_timeout"] = READ_S
    return Redis.from_pool(pool)


def reachable(call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Turn trouble with the server into Unavailable; an error of ours passes."""

    @functools.wraps(call)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except (RedisError, OSError, RuntimeError) as error:
            if not is_outage(error):
                raise
            log.debug("redis: %s", error)
            raise Unavailable(f"Redis does not answer ({type(error).__name__})", retry_after_s=1) from None

    return wrapped


def is_outage(error: Exception) -> bool:
    """Whether the server is away, loading, full, read-only or forbids the command: nothing we sent was wrong."""
    if isinstance(error, ResponseError) and (str(error).startswith(OUTAGE_CODES) or IN_SCRIPT.search(str(error))):
        return True
    if isinstance(error, RuntimeError):  # what uvloop says of a transport that was closed under redis-py
        return "handler is closed" in str(error)
    return isinstance(error, (*OUTAGES, OSError))


def refuse_unfit(info: dict[str, Any], missing: Sequence[str] = ()) -> None:
    """UnfitStore for a server (its INFO) that would lose work: too old, `missing` commands, or free to evict keys."""
    valkey = info.get("valkey_version")
    version = str(valkey or info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < ((7, 2) if valkey else (6, 2)):
        raise UnfitStore(f"the server is {version}; Redis >= 6.2 or Valkey >= 7.2 is needed")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise UnfitStore(f"maxmemory-policy is {policy}: jobs could be evicted; set it to noeviction")
    if missing:
        raise UnfitStore(f"the server lacks {', '.join(name.upper() for name in missing)}: use another, or enable it")
