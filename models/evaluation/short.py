"""The table that a user reads first: every served method, what it is worth and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

from models.evaluation.report import markdown, origin
from models.evaluation.served_times import BATCHES, REPEATS, Times
from models.evaluation.uncertainty import Study, quality


def short_table(
    found: Study, macs: Mapping[str, float], times: Times, where: dict[str, str], on: str = "one torch thread"
) -> str:
    """Served methods by cost; `macs` relative to the source, `times` as served."""
    backends = [name for name in ("eager", "onnx") if ("single", name, BATCHES[0]) in times]
    rows = []
    for method in sorted(found.methods, key=lambda m: macs[m]):
        q = quality(found, method)
        took = [times[method, name, BATCHES[0]] / times["single", name, BATCHES[0]] for name in backends]
        rows.append(
            [
                f"`{method}`",
                f"{100 * q.accuracy:.2f}",
                f"{q.nll.value:.4f} ± {q.nll.se:.4f}",
                f"{q.ece:.3f}",
                f"{q.accepted:.1%}",
                f"{q.risk.value:.1%}",
                f"{macs[method]:.2f}",
                *(f"{value:.2f}" for value in took),
            ]
        )
    header = ["method", "accuracy", "NLL", "ECE", "accepted", "error of accepted", "MACs"]
    note = (
        "As served, calibrated, on the test images; ± by bootstrap over images. MACs and time are relative to "
        f"`single`, with the distance of features where it runs; time from admission to answer on {on}, "
        f"{BATCHES[0]} images at a time, the fastest of {REPEATS} turns, each backend against itself. {origin(where)}"
    )
    return f"{markdown([*header, *(f'time, {name}' for name in backends)], rows)}\n\n{note}"
