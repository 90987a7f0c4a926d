"""Made-up traffic that moves every series of one gateway and one worker by known amounts."""

from __future__ import annotations

from models.api import DecisionRule, ExitSchedule, Gear, ModelInfo, StepStats
from service.metrics import KINDS, SHADOWS, SHIFTS, GatewayMetrics, WorkerMetrics

GENERATOR = ModelInfo(
    name="painter",
    task="generate",
    labels=("a", "b"),
    image=(28, 28, 1),
    weights="f" * 64,
    depth=8,
    gears=tuple(
        Gear(name, ExitSchedule((1.0,), (depth,)), "ddim", 20, 1.0) for name, depth in (("full", 8), ("balanced", 6))
    ),
    default_gear="balanced",
)
CLASSIFIER = ModelInfo(
    name="judge",
    task="classify",
    labels=("a", "b"),
    image=(28, 28, 1),
    weights="e" * 64,
    methods={"single": 1.0, "bridge": 1.2, "exits": 0.6},
    decisions={"bridge": DecisionRule("entropy", 0.6, 1.5, "coverage_at_risk", 0.05, 0.95, 0.85, 0.04, 0.05)},
    default_method="bridge",
)
TICK = StepStats(rows=4, layer_evals=24, layer_evals_full=32, depth_counts={(0, 8): 2, (5, 6): 1, (9, 2): 1})


class Traffic:
    """Series of one gateway and one worker; each `round` moves all of them by the same amounts."""

    def __init__(self) -> None:
        self.gateway, self.worker = GatewayMetrics(), WorkerMetrics()
        for info in (GENERATOR, CLASSIFIER):
            self.worker.declare(info, "cpu")

    def round(self) -> None:
        """Four requests of each kind, one of them refused, and one tick of each kind."""
        for task, model, mode in (("generate", "painter", "balanced"), ("classify", "judge", "bridge")):
            for outcome in ("ok", "ok", "ok", "rejected"):
                self.gateway.requests.labels(task, model, outcome).inc()
                self.gateway.duration.labels(task, model).observe(0.25)
            self.gateway.refusals.labels(model, "queue_full").inc()
            self.gateway.limit.labels(model).set(0.9)
            self.gateway.waiting.labels(task).set(2)
            self.gateway.queue_jobs.labels(model).set(3)
            self.gateway.backlog.labels(model).set(480)
            self.gateway.letters.labels(model).set(1)
            for state, jobs in (("accepted", 4), ("ok", 3), ("cancelled", 1)):
                self.gateway.jobs.labels(model, state).inc(jobs)
            self.gateway.workers.labels(model).set(1)
            self.worker.queue_wait.labels(model).observe(0.01)
            self.worker.run.labels(model).observe(0.2)
            self.worker.deadline_slack.labels(model).observe(5.0)
            self.worker.deadline_missed.labels(model, "waiting").inc()
            self.worker.batch_splits.labels(model, "error").inc()
            self.worker.checkpoints.labels(model).inc(4)
            self.worker.rows_restored.labels(model).inc(4)
            self.worker.slots.labels(model, "busy").set(4)
            self.worker.outcomes.labels(model, "ok").inc(3)
            self.worker.images.labels(model, mode).inc(4)
            self._gears(model, task)
        self.gateway.webhooks.labels("delivered").inc()
        self.worker.ticked("painter", 0.02, TICK, jobs=2)
        self.worker.ticked("judge", 0.01, StepStats(rows=4), jobs=1)
        for decision, images in (("accept", 6), ("escalate", 1), ("abstain", 1)):
            self.worker.decisions.labels("judge", "bridge", decision).inc(images)
        for stage, images in (("1", 5), ("2", 2), ("3", 1)):
            self.worker.early_exits.labels("judge", stage).inc(images)
        self.worker.entropy.labels("judge", "bridge").observe(0.4)
        self.worker.disagreement.labels("judge", "bridge").observe(0.05)

    def _gears(self, model: str, task: str) -> None:
        """The second gear, under strain; three jobs, two of them downgraded; four shadows, one of another class."""
        rungs = {"painter": ("full", "balanced"), "judge": ("bridge", "single")}[model]
        shifts = dict.fromkeys(SHIFTS, 1)
        self.worker.geared(model, rungs, 1, {"running": 0.5, "waiting": 1.5}, shifts, floor_hits=1)
        self.worker.rows_shifted.labels(model).inc(4)
        self.worker.jobs_by_gear.labels(model, rungs[0], "false").inc(1)
        self.worker.jobs_by_gear.labels(model, rungs[1], "true").inc(2)
        for kind in KINDS[task]:
            for i in range(4):
                self.worker.shadow_gap.labels(model, kind).observe(0.05 if kind != "class" else float(i == 0))
        for outcome in SHADOWS:
            self.worker.shadow_runs.labels(model, outcome).inc()
