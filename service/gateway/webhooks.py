"""Telling a client's URL that its job has ended: signed (Standard Webhooks 1.0), repeated until it is heard.

A hook waits in Redis until some gateway has had an answer for it, so a gateway that dies loses none: its hooks are
due again when their lease is over, to be told twice at worst. `webhook-id` is the job's id, the same at every try.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import ssl
import time
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from importlib.metadata import version

import h11
from redis.exceptions import RedisError

from service.broker.hooks import Hook
from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import BadRequest, OfframpError
from service.gateway.answers import short_receipt
from service.gateway.outbound import TIMEOUT_S, Refused, checked_url, post
from service.gateway.schemas import HookBody, HookData, job_state
from service.metrics import GatewayMetrics

TRIES = 8
PAUSE_S = (5.0, 3.0, 1800.0)  # first, factor, longest: about an hour in all
LEASE_MS = round(3000 * TIMEOUT_S)
AT_ONCE = 32
log = logging.getLogger(__name__)


def check_webhook(url: str | None, settings: Settings) -> None:
    """BadRequest for a webhook that could never be told."""
    if url is None:
        return
    if settings.webhook_secret is None:
        raise BadRequest("webhooks are off: the operator has to set OFFRAMP_WEBHOOK_SECRET", field="webhook")
    checked_url(url, settings.webhook_private)


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`; `secret` is whsec_ and base64."""
    key = b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{b64encode(signed.digest()).decode()}"


def pause_s(tries: int) -> float:
    """Seconds before the next try, after `tries` of them: exponential, by a quarter more or less."""
    first, factor, longest = PAUSE_S
    return min(first * factor ** (tries - 1), longest) * random.uniform(0.75, 1.25)


class Webhooks:
    """One gateway's sender; `async with` runs it. Idle without a secret."""

    def __init__(self, broker: Broker, metrics: GatewayMetrics, settings: Settings, poll_s: float = 1.0) -> None:
        self._broker, self._metrics, self._poll_s = broker, metrics, poll_s
        self._secret, self._private = settings.webhook_secret, settings.webhook_private
        self._calls: set[asyncio.Task[None]] = set()
        self._runner: asyncio.Task[None] | None = None
        self._tls: ssl.SSLContext | None = None
        self._stopping = False

    async def __aenter__(self) -> Webhooks:
        if self._secret is not None:
            self._stopping, self._tls = False, ssl.create_default_context()
            self._runner = asyncio.create_task(self._run(), name="webhooks")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; calls that are cut short are due again at the end of their lease."""
        self._stopping = True
        tasks = [task for task in (self._runner, *self._calls) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while not self._stopping:
            try:
                for model in await self._broker.models():
                    await self._take(model)
            except (OfframpError, RedisError) as error:
                log.debug("webhooks wait: %s", error)
            except Exception:
                log.exception("webhooks cannot be read")
            await asyncio.sleep(self._poll_s)

    async def _take(self, model: str) -> None:
        """Start the calls of one model that are due, at most `AT_ONCE` in all."""
        if free := AT_ONCE - len(self._calls):
            for hook in await self._broker.due_hooks(model, LEASE_MS, free):
                call = asyncio.create_task(self._tell(model, hook))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    async def _tell(self, model: str, hook: Hook) -> None:
        try:
            outcome, why = await self._try(model, hook)
            self._metrics.webhooks.labels(outcome).inc()
            if outcome == "retried":
                log.info("webhook of %s failed (%s), try %d of %d", hook.id, why, hook.tries, TRIES)
                await self._broker.hook_again(model, hook.id, round(1000 * pause_s(hook.tries)))
                return
            if outcome != "delivered":
                log.warning("webhook of %s %s after %d tries: %s", hook.id, outcome, hook.tries, why)
            await self._broker.hook_over(model, hook.id)
        except (OfframpError, RedisError) as error:
            log.info("webhook of %s is left to its lease: %s", hook.id, error)

    async def _try(self, model: str, hook: Hook) -> tuple[str, str]:
        """One call: its outcome, a label of the metric, and what was wrong."""
        try:
            status = await self._post(hook, await self._body(model, hook))
        except (Refused, BadRequest) as error:
            return "refused", str(error)
        except (OSError, ValueError, h11.ProtocolError) as error:
            why = f"{type(error).__name__}: {error}"
        else:
            if 200 <= status < 300:
                return "delivered", ""
            why = f"it answered {status}"
            if status == 410:
                return "gone", why
        return ("retried" if hook.tries < TRIES else "given_up"), why

    async def _body(self, model: str, hook: Hook) -> bytes:
        """Small: of the result, while it is kept, only the receipt or what went wrong."""
        state = job_state(hook.outcome)
        data = HookData(id=hook.id, model=model, status=state)
        if result := await self._broker.result(model, hook.id):
            data.receipt = short_receipt(result.receipt) or None
            if result.failure:
                data.error = {"code": result.failure.code, "detail": result.failure.message}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        body = HookBody.model_validate({"type": f"job.{state}", "timestamp": now, "data": data})
        return body.model_dump_json(exclude_none=True).encode()

    async def _post(self, hook: Hook, body: bytes) -> int:
        assert self._secret is not None
        assert self._tls is not None
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"Offramp/{version('offramp')}",
            "webhook-id": hook.id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(self._secret.get_secret_value(), hook.id, now, body),
        }
        return await post(hook.url, headers, body, self._private, self._tls)
