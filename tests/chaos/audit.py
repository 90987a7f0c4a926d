"""What must hold when nobody asks any more: nothing lost, nothing twice, nothing wrong, nothing left behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from redis import Redis

from tests.chaos.clients import Client, Told
from tests.support import wait_for

OUTCOMES = ("ok", "failed", "expired", "cancelled", "dead")
MODEL_KEY = re.compile(r"offramp:\{m:(?P<model>.+)\}:(?P<kind>[a-z]+)(?::(?P<rest>.*))?")
STANDING = {"q", "ledger", "backlog", "workers", "rates", "best", "turns", "dlq"}  # kept for as long as the model is
MORTAL = {"job", "res", "ev", "hook"}  # must have a time to live once the job is over


@dataclass
class Ledger:
    """Counts of a run; `broken` says in words what should not be."""

    asked: int = 0
    states: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    double: int = 0
    wrong: int = 0
    models: dict[str, dict[str, int]] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.double or self.wrong or self.broken)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit(redis: Redis, told: Sequence[Told], replay: Client | None = None, exact: bool = True) -> Ledger:
    """Count what clients were told against what the store says.

    Args:
        replay: asks every twentieth finished request again: same id, same answer, nothing accepted anew.
        exact: the store lost nothing, so it must have accepted each ask once and no more.
    """
    found = Ledger(len(told), dict(Counter(one.state for one in told)))
    found.retries = dict(Counter(trouble for one in told for trouble in one.troubles).most_common(12))
    found.lost = sum(one.state == "unknown" for one in told)
    found.broken += [f"{one.ask.key}: {one.wrong}" for one in told if one.wrong]
    ended = [one for one in told if one.state not in ("unknown", one.ask.expect)]
    found.broken += [f"{one.ask.key} {one.state}, not {one.ask.expect}: {one.problem.get('detail')}" for one in ended]
    found.wrong = sum(bool(one.wrong) for one in told) + len(ended)
    found.broken += [f"{one.ask.key} unknown: {one.troubles[-3:]}" for one in told if one.state == "unknown"][:5]
    names = {one.ask.body["model"] for one in told}
    wait_for("empty queues", lambda: not any(waiting(redis, model) for model in names), 60)
    for model in sorted(names):
        ledger = {k.decode(): int(v) for k, v in redis.hgetall(f"offramp:{{m:{model}}}:ledger").items()}
        found.models[model] = ledger
        ended = sum(ledger.get(outcome, 0) for outcome in OUTCOMES)
        if ledger.get("accepted", 0) != ended:
            found.broken.append(f"{model}: accepted {ledger.get('accepted', 0)}, ended {ended}, none waiting")
        mine = [one for one in told if one.ask.body["model"] == model]
        ok = sum(one.state == "ok" for one in mine)
        if exact:
            found.double += max(0, ledger.get("ok", 0) - ok)
            if ledger.get("accepted", 0) != len(mine):
                found.broken.append(f"{model}: {len(mine)} asked, {ledger.get('accepted', 0)} accepted")
        found.broken += _unlike(redis, model, mine)
    found.broken += left_behind(redis)
    if replay is not None:
        _replay(redis, found, told, replay)
    return found


def waiting(redis: Redis, model: str) -> int:
    """Entries in a model's streams."""
    return sum(redis.xlen(key) for key in redis.scan_iter(f"offramp:{{m:{model}}}:q:*", count=1000))


def _unlike(redis: Redis, model: str, told: Sequence[Told]) -> list[str]:
    """Jobs whose state in the store is another than the client's."""
    known = [one for one in told if one.id]
    with redis.pipeline(transaction=False) as pipe:
        for one in known:
            pipe.hget(f"offramp:{{m:{model}}}:job:{one.id}", "state")
        states = pipe.execute()
    pairs = [(one, state.decode()) for one, state in zip(known, states, strict=True) if state is not None]
    return [
        f"{one.id}: the client heard {one.state}, the store says {state}" for one, state in pairs if state != one.state
    ]


def left_behind(redis: Redis) -> list[str]:
    """Keys that should be gone, empty, or have a time to live."""
    broken = []
    for key in (key.decode() for key in redis.scan_iter("*", count=1000)):
        match = MODEL_KEY.fullmatch(key)
        kind = match["kind"] if match else ""
        if kind == "q":
            groups = redis.xinfo_groups(key)
            pending = sum(group["pending"] for group in groups)
            if redis.xlen(key) or pending:
                broken.append(f"{key}: {redis.xlen(key)} entries, {pending} pending")
        elif kind == "backlog":
            if any(int(value) for value in redis.hvals(key)):
                broken.append(f"{key}: {redis.hgetall(key)}")
        elif kind in STANDING or key == "offramp:catalogue":
            continue
        elif kind in MORTAL or not match:
            if redis.ttl(key) == -1:
                broken.append(f"{key} lives for ever")
        else:
            broken.append(f"{key} is left behind")
    return broken[:20]


def _replay(redis: Redis, found: Ledger, told: Sequence[Told], client: Client) -> None:
    for one in [one for one in told if one.state == "ok"][::20]:
        again = client.get(one.ask)
        if again.id != one.id or again.wrong:
            found.double += 1
            found.broken.append(f"{one.ask.key}: {one.id} first, asked again {again.id} {again.wrong}")
    for model, before in found.models.items():
        now = int(redis.hget(f"offramp:{{m:{model}}}:ledger", "accepted") or 0)
        if now != before.get("accepted", 0):
            found.broken.append(f"{model}: {now - before.get('accepted', 0)} replays were accepted as new jobs")
