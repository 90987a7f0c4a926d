"""SIGKILL of a worker, a gateway and the store under load: nothing lost, nothing twice, nothing wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.chaos.audit import audit
from tests.chaos.clients import Client, Crowd, drill_ask
from tests.chaos.fleet import DRILL, Fleet

pytestmark = pytest.mark.e2e
ASKS = 300


@pytest.fixture(scope="module", params=["always"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("kills")
    with Fleet(folder, [[DRILL], [DRILL]], gateways=2, fsync=request.param) as running:
        yield running


@pytest.mark.parametrize("victim", ["worker", "gateway", "store", "all"])
def test_a_kill_under_load_costs_nothing(fleet: Fleet, victim: str) -> None:
    fleet.ready()
    asks = [drill_ask(DRILL, n, f"kill-{victim}", poll=n % 4 == 0, deadline_ms=60_000) for n in range(ASKS)]
    crowd = Crowd(fleet.ports, asks, 12).start()
    for turn in range(2):
        time.sleep(0.6)
        for one in {"worker": [fleet.workers[turn]], "gateway": [fleet.gateways[turn]], "store": [fleet.store]}.get(
            victim, [fleet.workers[turn], fleet.gateways[turn], fleet.store]
        ):
            one.kill()
        time.sleep(0.2)
        fleet.tend()
    fleet.told += crowd.join()
    found = audit(fleet.redis(), fleet.told, Client(fleet.ports))
    assert found.sound, found
    assert set(found.states) == {"ok"}
