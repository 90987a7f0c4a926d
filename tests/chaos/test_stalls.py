"""Workers that are alive and not there: stopped past their leases, cut off, slow, or living in another time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos import faults
from tests.chaos.audit import audit
from tests.chaos.clients import Client, Crowd, drill_ask
from tests.chaos.fleet import DRILL, Fleet
from tests.support import require

pytestmark = pytest.mark.e2e
SLOW = {**DRILL, "name": "slow", "evaluations": 60}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers, both behind proxies."""
    folder = tmp_path_factory.mktemp("stalls")
    with Fleet(folder, [[SLOW], [SLOW]], proxied=[0, 1], max_deliveries="20") as running:
        yield running


def under(fleet: Fleet, run: str, fault: Callable[[Fleet, random.Random], None], times: int = 1) -> None:
    """Ask while the fault happens, then audit."""
    fleet.ready()
    crowd = Crowd(fleet.ports, [drill_ask(SLOW, n, run, deadline_ms=100_000) for n in range(60)], 12, 100).start()
    draw = random.Random(0)
    for _ in range(times):
        threading.Event().wait(0.5)
        fault(fleet, draw)
    fleet.told += crowd.join()
    found = audit(fleet.redis(), fleet.told, Client(fleet.ports))
    assert found.sound, found
    assert set(found.states) == {"ok"}


def test_stopped_past_the_lease_and_back(fleet: Fleet) -> None:
    under(fleet, "stop", faults.stop_worker)


@pytest.mark.parametrize("fault", ["cut_network", "swallow_network", "slow_network"])
def test_network_between_worker_and_store(fleet: Fleet, fault: str) -> None:
    under(fleet, fault, faults.FAULTS[fault])


def test_two_workers_race_for_leases_again_and_again(fleet: Fleet) -> None:
    """Redelivery storm: both workers in turn lose every lease while they go on computing."""

    def both(fleet: Fleet, draw: random.Random) -> None:
        for number in (0, 1):
            fleet.proxies[number].swallow()
        threading.Event().wait(1.5)
        for number in (0, 1):
            fleet.proxies[number].heal()

    under(fleet, "race", both, times=2)


@pytest.mark.parametrize("shift", ["-3600s", "+3600s"])
def test_clock_of_a_worker_moved(tmp_path: Path, shift: str) -> None:
    require("faketime")
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    moved = {"LD_PRELOAD": str(library), "FAKETIME": shift, "DONT_FAKE_MONOTONIC": "1"}
    swift = {**DRILL, "step_ms": 0}  # libfaketime moves the end of a sleep
    with Fleet(tmp_path / "fleet", [[swift], [swift]], extra={0: moved}) as fleet:
        crowd = Crowd(fleet.ports, [drill_ask(swift, n, "clock", deadline_ms=30_000) for n in range(200)], 8).start()
        found = audit(fleet.redis(), crowd.join(), Client(fleet.ports))
        assert "job finished" in fleet.logs(0)
    assert found.sound, found
    assert found.states == {"ok": 200}
