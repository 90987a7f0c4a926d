"""A real Prometheus scrapes a running `offramp up`: every expression of the dashboard returns data that load moves."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from tests.monitoring import Prometheus, Query, prometheus, queries
from tests.support import Offramp, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.prometheus, pytest.mark.zoo]

CLIENTS, MOST_ROUNDS = 3, 60
# Nothing dies, fails, is late or refused under this load.
QUIET = {
    "Redeliveries",
    "Refusals",
    "Dead letters",
    "Deadline misses",
    "Checkpoints and restores",
    "Batch splits",
    "Webhooks",
    "Ledger balance",
    "Saved and downgraded",
    "Gear shifts",
    "Floor hits",
    "Shadow runs",
}
# Without a downgraded answer there is nothing to make again; tests/e2e/test_shadow.py makes some.
UNSEEN = {"Shadow gap", "Class agreement"}


def picture(seed: int) -> str:
    pixels = random.Random(seed).randbytes(28 * 28)
    encoded = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode()


def client(url: str, number: int, enough: Event) -> None:
    """One client's requests, one after the other, until there has been enough or its rounds are over."""
    gears = product(("balanced", "eco", "full"), ("ddim", "dpmpp_2m", "ddpm"))
    bodies = [{"n": 2, "steps": 8 + number, "gear": gear, "solver": solver, "seed": number} for gear, solver in gears]
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in range(MOST_ROUNDS):
            http.post("/generate", json=bodies[turn % len(bodies)]).raise_for_status()
            later = http.post("/generate", json={"n": 2, "steps": 50}, headers={"Prefer": "respond-async"})
            assert http.delete(later.headers["Location"]).status_code in (200, 409)
            for method in ("single", "bridge", "ensemble", "exits"):
                images = [picture(turn), picture(turn + 1)]
                http.post("/classify", json={"images": images, "method": method}).raise_for_status()
            if enough.is_set():
                return


@contextmanager
def load(url: str) -> Iterator[list[Future[None]]]:
    """A little concurrent load for as long as the block runs; errors of the clients are raised at its end."""
    enough = Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, url, number, enough) for number in range(CLIENTS)]
        try:
            yield running
        finally:
            enough.set()
    for future in running:
        future.result()


def silent(server: Prometheus, asked: list[Query]) -> list[Query]:
    """Expressions without data or, unless load cannot move them, with nothing but zeros."""
    values = {query: server.history(query.expr) for query in asked}
    return [query for query, found in values.items() if not (any(found) or (found and query.panel in QUIET))]


def test_dashboard_shows_a_running_service(offramp_up: Offramp, tmp_path: Path) -> None:
    targets = {"gateway": urlsplit(offramp_up.url).netloc, "worker": urlsplit(offramp_up.worker_metrics_url).netloc}
    with prometheus(tmp_path, targets) as server:
        left = [query for query in queries() if query.panel not in UNSEEN]
        with load(offramp_up.url) as running:

            def all_moved() -> bool:
                nonlocal left
                left = silent(server, left)
                return not left or all(future.done() for future in running)

            wait_for("data behind the dashboard", all_moved, 240, pause=2.0)
        left = silent(server, left)
        assert not left, f"no data, or only zeros: {left}"


def test_one_family_of_each_process_is_scraped(offramp_up: Offramp) -> None:
    gateway = httpx.get(f"{offramp_up.url}/metrics").text
    worker = httpx.get(offramp_up.worker_metrics_url).text
    assert 'role="gateway"' in gateway
    assert 'role="worker"' in worker
    assert "offramp_queue_jobs" in gateway
    assert "offramp_exit_depth_bucket" in worker
