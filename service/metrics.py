"""Every Prometheus series. Nobody else imports prometheus_client; docs/metrics.md is tested against this."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest, start_http_server
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from models.api import DecisionName, ModelInfo, StepStats
from service.ladders import rungs_of
from service.protocol import Outcome

# fmt: off
SECONDS = (
    0.001, 0.002, 0.004, 0.007, 0.012, 0.02, 0.035, 0.06, 0.1, 0.17, 0.3, 0.5, 0.85, 1.5, 2.5, 4, 7, 12, 20, 35, 60, 120
)
# fmt: on
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.3, 3.0, 5.0)
GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
EXITS = ("1", "2", "3")  # stages of a classifier that may answer
OUTCOMES = ("ok", "bad_request", "rejected", "expired", "cancelled", "failed", "unavailable")
REFUSALS = ("queue_full", "rate_limited", "quota_exceeded", "no_worker", "unavailable", "deadline_exceeded")
SHIFTS = ("load", "deadline", "calm", "idle")
SHADOWS = ("compared", "abandoned", "failed", "dropped")
KINDS = {"generate": ("pixels", "probabilities", "class"), "classify": ("probabilities", "class")}
WEBHOOKS = ("delivered", "retried", "given_up", "gone", "refused")


class GatewayMetrics:
    """Series of one gateway process."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("offramp_requests", "Requests by outcome.", ["task", "model", "outcome"], registry=r)
        self.refusals = Counter(
            "offramp_refusals", "Requests refused before they were queued.", ["model", "reason"], registry=r
        )
        self.duration = Histogram(
            "offramp_request_duration_seconds", "Arrival to answer.", ["task", "model"], buckets=SECONDS, registry=r
        )
        self.waiting = Gauge("offramp_requests_waiting", "Requests awaiting their answer.", ["task"], registry=r)
        self.queue_jobs = Gauge("offramp_queue_jobs", "Jobs waiting or running, from Redis.", ["model"], registry=r)
        self.backlog = Gauge("offramp_queue_cost", "Queued and running cost, from Redis.", ["model"], registry=r)
        self.jobs = Gauge(
            "offramp_ledger_jobs", "The conservation ledger kept by Redis.", ["model", "state"], registry=r
        )
        self.letters = Gauge("offramp_dead_letters", "Dead letters kept.", ["model"], registry=r)
        self.workers = Gauge("offramp_workers", "Live workers.", ["model"], registry=r)
        self.limit = Gauge(
            "offramp_admission_limit", "Share of the last job's budget that could be foreseen.", ["model"], registry=r
        )
        self.webhooks = Counter("offramp_webhooks", "Calls of webhooks.", ["outcome"], registry=r)
        for outcome in WEBHOOKS:
            self.webhooks.labels(outcome)
        _build_info(r, "gateway")

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class ExitDepths(Collector):
    """Exit depth histogram, one bucket per block, added to in bulk once a tick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, int], list[int]] = {}

    def declare(self, model: str, depth: int) -> None:
        """Make the buckets of `model`: depths 1..depth in ten time bins."""
        with self._lock:
            for u_bin in range(10):
                self._counts[model, u_bin] = [0] * (depth + 1)

    def add(self, model: str, counts: Iterable[tuple[tuple[int, int], int]]) -> None:
        """Add ((time bin, depth), rows) counts of one tick."""
        with self._lock:
            for (u_bin, depth), rows in counts:
                self._counts[model, u_bin][depth] += rows

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """One family, labels model and u_bin (lower end of the tenth of diffusion time)."""
        family = HistogramMetricFamily(
            "offramp_exit_depth", "Blocks run per evaluation, by diffusion time.", labels=["model", "u_bin"]
        )
        with self._lock:
            for (model, u_bin), counts in sorted(self._counts.items()):
                total, buckets = 0, []
                for depth, rows in enumerate(counts):
                    total += rows
                    if depth:
                        buckets.append((str(float(depth)), float(total)))
                buckets.append(("+Inf", float(total)))
                weight = sum(depth * rows for depth, rows in enumerate(counts))
                family.add_metric([model, f"{u_bin / 10:.1f}"], buckets, sum_value=float(weight))
        yield family


class WorkerMetrics:
    """Series of one worker process, fed from plain StepStats."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.queue_wait = Histogram(
            "offramp_queue_wait_seconds", "Submit to admission.", ["model"], buckets=SECONDS, registry=r
        )
        self.run = Histogram("offramp_run_seconds", "Admission to last tick.", ["model"], buckets=SECONDS, registry=r)
        self.tick = Histogram("offramp_tick_duration_seconds", "One tick.", ["model"], buckets=SECONDS, registry=r)
        self.rows = Histogram("offramp_batch_rows", "Rows of a tick.", ["model"], buckets=ROWS, registry=r)
        self.mixed = Counter("offramp_mixed_ticks", "Ticks whose rows came from several jobs.", ["model"], registry=r)
        self.slots = Gauge("offramp_slots", "Slots by state.", ["model", "state"], registry=r)
        self.layer_evals = Counter(
            "offramp_layer_evals", "Blocks x network rows, run and skipped by exits.", ["model", "kind"], registry=r
        )
        self.decoded = Counter("offramp_decoded_images", "Rows that the codec decoded.", ["model"], registry=r)
        self.outcomes = Counter("offramp_jobs", "Jobs finished by this worker.", ["model", "outcome"], registry=r)
        self.images = Counter("offramp_images", "Images answered.", ["model", "mode"], registry=r)
        self.redeliveries = Counter("offramp_redeliveries", "Jobs received again.", ["model"], registry=r)
        self.leases_lost = Counter(
            "offramp_leases_lost", "Jobs that went to another while this worker stalled.", ["model"], registry=r
        )
        self.checkpoints = Counter("offramp_checkpoints", "States of rows that were saved.", ["model"], registry=r)
        self.entropy = Histogram(
            "offramp_predictive_entropy_nats", "Entropy of answers.", ["model", "method"], buckets=NATS, registry=r
        )
        self.disagreement = Histogram(
            "offramp_disagreement_nats", "KL(source || estimate).", ["model", "method"], buckets=NATS, registry=r
        )
        self.decisions = Counter(
            "offramp_decisions", "Images accepted, escalated, abstained.", ["model", "method", "decision"], registry=r
        )
        self.early_exits = Counter(
            "offramp_classify_exits", "Images by the stage of the source that answered.", ["model", "exit"], registry=r
        )
        self.model = Info("offramp_model", "Model served by this worker.", ["model"], registry=r)
        self.exit_depth = ExitDepths()
        r.register(self.exit_depth)
        _build_info(r, "worker")
        self.deadline_slack = Histogram(
            "offramp_deadline_slack_seconds",
            "Time to spare at admission: until the deadline, less the evaluations to come; 0 where there is none.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.deadline_missed = Counter(
            "offramp_deadline_missed", "Jobs late or sure to be, by where they were.", ["model", "when"], registry=r
        )
        self.batch_splits = Counter(
            "offramp_batch_splits", "Batches halved after an error or lack of memory.", ["model", "reason"], registry=r
        )
        self.rows_restored = Counter(
            "offramp_rows_restored", "Rows that went on from a saved state.", ["model"], registry=r
        )
        self._declare_gears(r)

    def _declare_gears(self, r: CollectorRegistry) -> None:
        self.rung = Gauge("offramp_rung", "Gear that the load asks for; 0 is the best.", ["model"], registry=r)
        self.rungs = Gauge("offramp_rungs", "Gears that the load chooses from.", ["model"], registry=r)
        self.gear = Gauge("offramp_gear", "1 for the gear that the load asks for.", ["model", "gear"], registry=r)
        self.strain = Gauge(
            "offramp_strain",
            "Time that the work takes in that gear, over the time that it may take.",
            ["model", "work"],
            registry=r,
        )
        self.gear_shifts = Counter("offramp_gear_shifts", "Changes of gear.", ["model", "reason"], registry=r)
        self.rows_shifted = Counter(
            "offramp_rows_shifted", "Rows that changed gear as they ran.", ["model"], registry=r
        )
        self.floor_hits = Counter(
            "offramp_floor_hits", "Jobs that their own floor kept from a cheaper gear.", ["model"], registry=r
        )
        self.jobs_by_gear = Counter(
            "offramp_jobs_by_gear",
            "Jobs answered, by the cheapest gear that they ran in.",
            ["model", "gear", "downgraded"],
            registry=r,
        )
        self.shadow_gap = Histogram(
            "offramp_shadow_gap",
            "Downgraded answers against the same in the best gear; 0 is none, 1 the most.",
            ["model", "kind"],
            buckets=GAPS,
            registry=r,
        )
        self.shadow_runs = Counter(
            "offramp_shadow_runs", "Downgraded answers to be made again.", ["model", "outcome"], registry=r
        )

    def declare(self, info: ModelInfo, device: str) -> None:
        """Make the series of a model before its first request, so that rates start at zero."""
        self.model.labels(info.name).info(
            {"task": info.task, "weights": info.weights[:12], "depth": str(info.depth), "device": device}
        )
        if info.task == "generate":
            self.exit_depth.declare(info.name, info.depth)
            self.decoded.labels(info.name)
            for kind in ("run", "skipped"):
                self.layer_evals.labels(info.name, kind)
        self.checkpoints.labels(info.name)
        for outcome in get_args(Outcome):
            self.outcomes.labels(info.name, outcome)
        for mode in [g.name for g in info.gears] + list(info.methods):
            self.images.labels(info.name, mode)
        for stage in EXITS if "exits" in info.methods else ():
            self.early_exits.labels(info.name, stage)
        for method in info.decisions:
            for decision in get_args(DecisionName):
                self.decisions.labels(info.name, method, decision)
        self.redeliveries.labels(info.name)
        self.leases_lost.labels(info.name)
        self.mixed.labels(info.name)
        for when in ("waiting", "running", "hopeless"):
            self.deadline_missed.labels(info.name, when)
        for reason in ("error", "memory"):
            self.batch_splits.labels(info.name, reason)
        self.rows_restored.labels(info.name)
        self._declare_gears_of(info)

    def _declare_gears_of(self, info: ModelInfo) -> None:
        for mode in [g.name for g in info.gears] + list(info.methods):
            self.jobs_by_gear.labels(info.name, mode, "false")
        rungs = rungs_of(info)
        if len(rungs) < 2:
            return
        for rung in rungs:
            self.jobs_by_gear.labels(info.name, rung.partition("@")[0], "true")
        for reason in SHIFTS:
            self.gear_shifts.labels(info.name, reason)
        self.rows_shifted.labels(info.name)
        self.floor_hits.labels(info.name)
        for kind in KINDS[info.task]:
            self.shadow_gap.labels(info.name, kind)
        for outcome in SHADOWS:
            self.shadow_runs.labels(info.name, outcome)
        self.geared(info.name, rungs, 0, {"running": 0.0, "waiting": 0.0})

    def geared(
        self,
        model: str,
        rungs: Sequence[str],
        rung: int,
        strain: Mapping[str, float],
        shifts: Mapping[str, int] = {},
        floor_hits: int = 0,
    ) -> None:
        """Where a model with several gears is, how strained it is there, and what has happened since the last call."""
        self.rung.labels(model).set(rung)
        self.rungs.labels(model).set(len(rungs))
        for work, value in strain.items():
            self.strain.labels(model, work).set(value)
        for i, gear in enumerate(rungs):
            self.gear.labels(model, gear).set(i == rung)
        for reason, count in shifts.items():
            self.gear_shifts.labels(model, reason).inc(count)
        if floor_hits:
            self.floor_hits.labels(model).inc(floor_hits)

    def ticked(self, model: str, seconds: float, stats: StepStats, jobs: int) -> None:
        """Record one tick: its duration, rows, layer evaluations and exit depths."""
        self.tick.labels(model).observe(seconds)
        self.rows.labels(model).observe(stats.rows)
        if stats.decoded:
            self.decoded.labels(model).inc(stats.decoded)
        if jobs > 1:
            self.mixed.labels(model).inc()
        if stats.layer_evals_full:
            self.layer_evals.labels(model, "run").inc(stats.layer_evals)
            self.layer_evals.labels(model, "skipped").inc(stats.layer_evals_full - stats.layer_evals)
            self.exit_depth.add(model, stats.depth_counts.items())

    def serve(self, host: str, port: int) -> Any:
        """Listen on host:port; returns prometheus_client's (server, thread)."""
        return start_http_server(port, host, self.registry)


def _build_info(registry: CollectorRegistry, role: str) -> None:
    Info("offramp_build", "What runs.", registry=registry).info({"version": version("offramp"), "role": role})
