"""The dashboard's expressions against a real Prometheus that scrapes our series, filled with known numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import start_http_server

from tests.monitoring import Prometheus, prometheus, queries
from tests.support import free_port, wait_for
from tests.traffic import Traffic

pytestmark = pytest.mark.prometheus


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    traffic, folder = Traffic(), tmp_path_factory.mktemp("prometheus")
    with ExitStack() as closing:
        ports = {"gateway": free_port(), "worker": free_port()}
        gateway = start_http_server(ports["gateway"], "127.0.0.1", traffic.gateway.registry)
        for server, thread in (gateway, traffic.worker.serve("127.0.0.1", ports["worker"])):
            closing.callback(thread.join)
            closing.callback(server.server_close)
            closing.callback(server.shutdown)
        traffic.round()
        targets = {job: f"127.0.0.1:{port}" for job, port in ports.items()}
        found = closing.enter_context(prometheus(folder, targets))

        def moved() -> bool:
            traffic.round()
            counts = ("offramp_request_duration_seconds_count", "offramp_run_seconds_count")
            return all(found.query(f"rate({count}[10s]) > 0") for count in counts)

        wait_for("two scrapes of each process that differ", moved, pause=1.0)
        yield found


def test_every_expression_returns_data(scraped: Prometheus) -> None:
    silent = [query for query in queries() if not scraped.history(query.expr)]
    assert not silent


def test_what_the_traffic_moves_is_not_zero(scraped: Prometheus) -> None:
    still = {query.panel for query in queries() if not any(scraped.history(query.expr))}
    assert still == {"Redeliveries"}


def test_the_numbers_are_those_of_the_traffic(scraped: Prometheus) -> None:
    answers = {query.panel: scraped.query(query.expr) for query in queries("30s")}
    for panel in ("Compute saved", "Compute saved by model"):
        assert [value for _, value in answers[panel]] == [pytest.approx(0.25)]
    assert [value for _, value in answers["Answered ok"]] == [pytest.approx(0.75)]
    assert {labels["model"]: value for labels, value in answers["Mixed ticks"]} == {"painter": 1.0, "judge": 0.0}
    depth = {labels["u_bin"]: value for labels, value in answers["Mean depth by diffusion time"]}
    run = {u_bin: value for u_bin, value in depth.items() if not math.isnan(value)}
    assert run == {"0.0": pytest.approx(8), "0.5": pytest.approx(6), "0.9": pytest.approx(2)}
    assert len(depth) == 10
    assert [value for _, value in answers["Class agreement"]] == [pytest.approx(0.75)] * 2
    gaps = {(labels["model"], labels["kind"]) for labels, value in answers["Shadow gap"] if abs(value - 0.05) < 1e-6}
    assert gaps == {("painter", "pixels"), ("painter", "probabilities"), ("judge", "probabilities")}
    shares = {(labels["model"], labels["gear"]): value for labels, value in answers["Jobs by gear"]}
    assert (shares["painter", "full"], shares["painter", "balanced"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert [value for _, value in answers["In time"]] == [pytest.approx(2 / 3)] * 2
    assert {labels["gear"]: value for labels, value in answers["Gear"]} == {
        **dict.fromkeys(("full", "bridge"), 0.0),
        **dict.fromkeys(("balanced", "single"), 1.0),
    }


def test_exit_depth_buckets_count_each_block_once(scraped: Prometheus) -> None:
    buckets = scraped.query('offramp_exit_depth_bucket{u_bin="0.5"} / on (u_bin) group_left offramp_exit_depth_count')
    shares = {float(labels["le"]): value for labels, value in buckets}
    assert shares == {float(depth): float(depth >= 6) for depth in range(1, 9)} | {float("inf"): 1.0}
