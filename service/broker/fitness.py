"""Whether the store may be used, asked once before a process starts."""

from __future__ import annotations

import asyncio

from service.broker.redis_streams import Broker
from service.config import ConfigError
from service.errors import Unavailable, UnfitStore

LOOK_S = 5.0


def refuse_unfit_store(url: str) -> None:
    """ConfigError for a server that would lose work; one that does not answer yet may come later, and is asked then."""
    asyncio.run(_look(url))


async def _look(url: str) -> None:
    broker = Broker(url)
    try:
        async with asyncio.timeout(LOOK_S):
            await broker.check()
    except UnfitStore as error:
        raise ConfigError(f"OFFRAMP_REDIS_URL: {error.detail}") from None
    except (Unavailable, TimeoutError):
        pass
    finally:
        await broker.aclose()
