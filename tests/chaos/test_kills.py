"""SIGKILL of a worker, a gateway and the store under load: nothing lost, nothing twice, nothing wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.audit import audit
from tests.chaos.clients import Client, Crowd, drill_ask
from tests.chaos.fleet import DRILL, Fleet
from tests.support import old_redis, system_redis

pytestmark = pytest.mark.e2e
ASKS = 300


VICTIMS = ["worker", "gateway", "store", "all"]
SERVERS: dict[str, Callable[[], str] | None] = {"valkey": None, "redis": system_redis, "redis62": old_redis}


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    find = SERVERS[request.param]
    executable = Path(find()) if find else None
    folder = tmp_path_factory.mktemp("kills")
    with Fleet(folder, [[DRILL], [DRILL]], gateways=2, fsync="always", executable=executable) as running:
        yield running


@pytest.mark.parametrize(
    ("fleet", "victim"),
    [("valkey", victim) for victim in VICTIMS] + [("redis", "all"), ("redis62", "all")],
    indirect=["fleet"],
    scope="module",
)
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
