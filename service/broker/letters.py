"""Dead letters: jobs that were delivered too often, kept with what is known of their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

from models.api import Priority
from service.broker import keys
from service.broker.connection import reachable
from service.broker.jobs import Jobs
from service.broker.store import as_bytes
from service.protocol import Job, decode_job


@dataclass(frozen=True)
class Letter:
    """A job that was given up; times are milliseconds of Redis TIME."""

    entry: str
    id: str
    rank: Priority
    rows: int
    cost: int
    owner: str
    attempts: int
    worker: str
    error: str
    submitted_ms: int
    dead_ms: int
    payload: bytes

    def job(self, job_id: str) -> Job:
        """The job under a new id."""
        return msgspec.structs.replace(decode_job(self.payload), id=job_id)


def new_id(model: str) -> str:
    """A fresh job id; the model is part of it, so that any gateway finds the job."""
    return f"{model}.{uuid4().hex}"


def model_of(job_id: str) -> str:
    """The model in a job id; empty where there is none."""
    return job_id.rpartition(".")[0]


class Letters(Jobs):
    """An operator's view of what was given up."""

    async def letters(self, model: str, count: int = 100) -> AsyncIterator[Letter]:
        """Oldest first."""
        after = "-"
        while found := await self._letters(model, after, count):
            for letter in found:
                yield letter
            after = f"({found[-1].entry}"

    @reachable
    async def models_with_letters(self) -> list[str]:
        """Every model that has one, served now or not."""
        before, after = keys.letters("*").split("*")
        found = [as_bytes(key).decode() async for key in self._redis.scan_iter(keys.letters("*"), 1000, "STREAM")]
        return sorted(key.removeprefix(before).removesuffix(after) for key in found)

    @reachable
    async def _letters(self, model: str, after: str, count: int) -> list[Letter]:
        found: Any = await self._redis.xrange(keys.letters(model), after, "+", count)
        return [_letter(*one) for one in found]

    @reachable
    async def letter(self, model: str, job_id: str) -> Letter | None:
        """The letter of a job."""
        async for letter in self.letters(model):
            if letter.id == job_id:
                return letter
        return None

    @reachable
    async def purge(self, model: str, entry: str) -> bool:
        """Throw a letter away; False when it is gone already."""
        return bool(await self._redis.xdel(keys.letters(model), entry))


def _letter(entry: bytes, fields: dict[bytes, bytes]) -> Letter:
    text = {key.decode(): value for key, value in fields.items()}
    payload = text.pop("payload")
    values = {key: value.decode() for key, value in text.items()}
    numbers = {key: int(values.pop(key)) for key in ("rows", "cost", "attempts", "submitted_ms", "dead_ms")}
    return Letter(entry=entry.decode(), payload=payload, **values, **numbers)  # type: ignore[arg-type]
