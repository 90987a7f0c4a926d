"""What a simulated run showed: numbers, a series by the second, a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.simulation.fleet import Fleet, Seen

SHOWN = (
    *("offered", "accepted", "refused", "expired", "accepted_in_time", "goodput_per_s", "p50_ms", "p95_ms", "p99_ms"),
    *("downgraded", "compute_saved", "rung_changes", "floor_broken"),
)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


def summary(fleet: Fleet, seen: Sequence[Seen]) -> dict[str, Any]:
    """Counts, latencies of answers, gears served (the cheapest that any evaluation of an answer ran in).

    `accepted_in_time`: answers within their deadline over accepted requests; `compute_saved`: of answers, against full
    depth at the same steps; `goodput_per_s`: answers in time, per second of the trace; `rung_changes`: a worker's mean.
    """
    good = [one for one in seen if one.outcome == "ok"]
    ended = Counter(one.outcome for one in seen)
    accepted, in_time = len(seen) - ended["full"] - ended["late"], sum(one.in_time for one in good)
    took = sorted(one.took_ms for one in good)
    whole = sum(one.receipt["layer_evals_full"] for one in good)
    return {
        "offered": len(seen),
        "accepted": accepted,
        "refused": len(seen) - accepted,
        "outcomes": dict(ended),
        "expired": ended["expired"],
        "in_time": in_time,
        "accepted_in_time": in_time / accepted if accepted else 0.0,
        "goodput_per_s": in_time / max(1.0, seen[-1].arrival.at),
        "p50_ms": quantile(took, 0.5),
        "p95_ms": quantile(took, 0.95),
        "p99_ms": quantile(took, 0.99),
        "gears": dict(Counter(one.receipt["gear"] for one in good)),
        "downgraded": sum(one.receipt["downgraded"] for one in good) / max(1, len(good)),
        "compute_saved": 1 - sum(one.receipt["layer_evals"] for one in good) / whole if whole else 0.0,
        "rung_changes": sum(worker.changes for worker in fleet.workers) / len(fleet.workers),
        "floor_broken": sum(one.receipt["floor_broken"] for one in good),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in order; 0 where there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def series(fleet: Fleet, seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """By the second of arrival: requests, refusals, answers in time, gears; and the fleet's mean rung and backlog."""
    seconds = [
        {"second": round(at), "offered": 0, "refused": 0, "in_time": 0, "gears": {}, "rung": rung, "backlog": backlog}
        for at, rung, backlog in fleet.samples
    ]
    for one in seen:
        here: dict[str, Any] = seconds[int(one.arrival.at)]
        here["offered"] += 1
        here["refused"] += one.outcome in ("full", "late")
        here["in_time"] += one.in_time
        if gear := one.receipt.get("gear"):
            here["gears"][gear] = here["gears"].get(gear, 0) + 1
    return seconds


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Runs side by side, one a column."""
    lines = [["", *runs]]
    lines += [[key.replace("_", " "), *(f"{run[key]:.4g}" for run in runs.values())] for key in SHOWN]
    lines.append(["gears", *(" ".join(f"{k}:{n}" for k, n in run["gears"].items()) for run in runs.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot(runs: Mapping[str, Sequence[Seen]], fleets: Mapping[str, Fleet], gears: Sequence[str], file: Path) -> None:
    """Latency over the deadline of every answer, by gear, and the fleet's mean rung (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, seen) in zip(axes, runs.items(), strict=True):
        for gear, colour in zip(gears, COLOURS, strict=False):
            shown = [one for one in seen if one.receipt.get("gear") == gear]
            took = [one.took_ms / one.deadline_ms for one in shown]
            axis.plot([one.arrival.at for one in shown], took, ".", ms=3, color=colour, label=gear)
        refused = [one.arrival.at for one in seen if one.outcome in ("full", "late")]
        axis.plot(refused, [0] * len(refused), "|", color="tab:red", ms=6, label="refused")
        axis.axhline(1.0, color="black", lw=0.8, ls="--")
        axis.set(title=name, ylabel="time taken / deadline")
        axis.legend(loc="upper right", fontsize=7, ncols=5)
        beside = axis.twinx()
        beside.step([at for at, _, _ in fleets[name].samples], [rung for _, rung, _ in fleets[name].samples], "0.6")
        beside.set(ylabel="mean rung", ylim=(-0.05, max(1, len(gears) - 1) + 0.05))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
