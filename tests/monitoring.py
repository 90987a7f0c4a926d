"""The dashboard's queries, and a real Prometheus to put them to."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import REPO, free_port, get_json, require, stop, wait_for

PROMETHEUS = REPO / "deploy" / "prometheus"
DASHBOARD = REPO / "deploy" / "grafana" / "dashboards" / "offramp.json"


@dataclass(frozen=True)
class Query:
    """One expression of the dashboard."""

    panel: str
    expr: str


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel with data, those in collapsed rows included."""
    inside = [panel for row in board["panels"] for panel in row.get("panels", [])]
    return [panel for panel in board["panels"] + inside if panel["type"] != "row"]


def queries(window: str = "10s") -> list[Query]:
    """Every expression, Grafana's variables filled in: all models, all time bins, ranges of `window`."""
    values = {"$__rate_interval": window, "$__range": window, "$model": ".*", "$u_bin": ".*"}
    found = []
    for panel in panels(dashboard()):
        for target in panel["targets"]:
            expr = target["expr"]
            for variable, value in values.items():
                expr = expr.replace(variable, value)
            assert "$" not in expr, f"{panel['title']}: a variable is left in {expr}"
            found.append(Query(panel["title"], expr))
    return found


class Prometheus:
    """The query API of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.started = time.time()

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series of an instant query; ValueError when it is refused."""
        return [(row["metric"], float(row["value"][1])) for row in self._data("query", query=expr)]

    def history(self, expr: str) -> list[float]:
        """Every number that `expr` has given since the start, at steps of one second."""
        span = {"start": str(int(self.started)), "end": str(math.ceil(time.time())), "step": "1"}
        rows = self._data("query_range", query=expr, **span)
        values = [float(value) for row in rows for _, value in row["values"]]
        return [value for value in values if not math.isnan(value)]

    def up(self, *jobs: str) -> bool:
        """Whether every named job has one target, which answered its last scrape."""
        return all([value for _, value in self.query(f'up{{job="{job}"}}')] == [1.0] for job in jobs)

    def _data(self, verb: str, **query: str) -> list[dict[str, Any]]:
        answer = get_json(f"{self.url}/api/v1/{verb}", **query)
        if not answer or answer["status"] != "success":
            raise ValueError(f"Prometheus refuses {query['query']!r}")
        rows: list[dict[str, Any]] = answer["data"]["result"]
        return rows


def scrape_config(targets: dict[str, str]) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml with its jobs pointed at `targets` (job to host:port) every second."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == set(targets)
    for name, job in jobs.items():
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [targets[name]]}]
    return config


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """A real Prometheus with our configuration over `targets`, all of them scraped at least once."""
    binary, port = require("prometheus"), free_port()
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    config.write_text(yaml.safe_dump(scrape_config(targets)))
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=warn"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [binary, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=sink, stderr=subprocess.STDOUT
        )
    server = Prometheus(f"http://127.0.0.1:{port}")

    def scraping() -> bool:
        assert process.poll() is None, f"prometheus stopped:\n{log.read_text()}"
        return get_json(f"{server.url}/api/v1/status/buildinfo") is not None and server.up(*targets)

    try:
        wait_for("prometheus scraping every target", scraping)
        yield server
    finally:
        stop(process)
