"""Pictures that break workers: their own jobs end, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.tasks.drill import Fault
from tests.chaos.audit import audit
from tests.chaos.clients import Client, Crowd, drill_ask
from tests.chaos.fleet import POISON, Fleet
from tests.support import wait_for

pytestmark = pytest.mark.e2e
MATES = 40


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("poison"), [[POISON]], max_deliveries="4") as running:
        yield running


@pytest.mark.parametrize(("fault", "outcome"), [(Fault.KILL, "dead"), (Fault.RAISE, "failed"), (Fault.MEMORY, "ok")])
def test_batch_mates_survive(fleet: Fleet, fault: Fault, outcome: str) -> None:
    fleet.ready()
    before = dict(fleet.redis().hgetall("offramp:{m:poison}:ledger"))
    run, expect = fault.name.lower(), "ok" if outcome == "ok" else "failed"
    asks = [drill_ask(POISON, n, run, deadline_ms=100_000) for n in range(MATES)]
    asks.insert(5, drill_ask(POISON, 1000, run, first=int(fault), expect=expect, deadline_ms=100_000))
    crowd = Crowd(fleet.ports, asks, 16, 90).start()
    wait_for("every answer", lambda: fleet.tend() or not crowd.busy(), 100, pause=0.1)
    fleet.told += crowd.join()
    found = audit(fleet.redis(), fleet.told, Client(fleet.ports))
    assert found.sound, found
    count = int(fleet.redis().hget("offramp:{m:poison}:ledger", outcome) or 0) - int(before.get(outcome.encode(), 0))
    assert count == (MATES + 1 if outcome == "ok" else 1)
