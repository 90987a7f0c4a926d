"""The store is full: clients hear it and come back, nothing that was accepted is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.audit import audit
from tests.chaos.clients import Client, Crowd, drill_ask
from tests.chaos.faults import PowerCut, free_store
from tests.chaos.fleet import DRILL, Fleet

pytestmark = pytest.mark.e2e


def test_a_full_store_refuses_and_keeps(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", [[DRILL]]) as fleet:
        crowd = Crowd(fleet.ports, [drill_ask(DRILL, n, "full", deadline_ms=60_000) for n in range(200)], 8).start()
        time.sleep(0.5)
        fleet.redis().config_set("maxmemory", 1)
        late = drill_ask(DRILL, 1000, "full", deadline_ms=60_000)
        status, problem, headers = Client(fleet.ports).once("POST", late.path, late)
        time.sleep(1.0)
        free_store(fleet.redis())
        told = [*crowd.join(), Client(fleet.ports).get(late)]
        found = audit(fleet.redis(), told, Client(fleet.ports))
    assert (status, problem["code"]) == (503, "unavailable")
    assert int(headers["retry-after"]) >= 1
    assert found.sound, found


def test_a_power_cut_under_everysec_loses_nothing_for_who_asks_again(tmp_path: Path) -> None:
    """The last second of the store's file is gone: a submit may be lost, and the same key runs the job again."""
    with Fleet(tmp_path / "fleet", [[DRILL]], fsync="everysec") as fleet, PowerCut(fleet.store.data_dir) as cut:
        asks = [drill_ask(DRILL, n, "power", deadline_ms=60_000) for n in range(400)]
        crowd = Crowd(fleet.ports, asks, 8).start()
        time.sleep(1.6)
        cut(fleet)
        fleet.tend()
        found = audit(fleet.redis(), crowd.join(), exact=False)
    assert cut.lost_bytes > 0
    assert found.sound, found
    assert found.states == {"ok": 400}
