"""Time per image of every gear relative to `full`, by batch size, one engine, alternating repeats.

    python benchmarks/bench_step.py [--threads N]

Prints a table of ratios with the ideal (the share of layer evaluations) beside them; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from models.evaluation.generate import balanced_work, run_work
from models.store import ZOO
from models.tasks.generate import load

BATCHES = (1, 4, 16, 32)
STEPS, REPEATS = 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    task = load(ZOO / "fashion-dit", max(BATCHES), "cpu")
    found = []
    print(f"{'batch':>6}{'gear':>10}{'time / full':>13}{'spread':>16}{'layer evals / full':>20}")
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {gear.name: [] for gear in task.info.gears}
        evals = {}
        for repeat in range(REPEATS + 1):
            for gear in task.info.gears:
                work = balanced_work(task, gear, 0, batch, 0, steps=STEPS)
                began = time.perf_counter()
                _, evals[gear.name] = run_work(task, work)
                if repeat:
                    seconds[gear.name].append(time.perf_counter() - began)
        for gear in task.info.gears:
            ratios = [a / b for a, b in zip(seconds[gear.name], seconds["full"], strict=True)]
            row = {
                "batch": batch,
                "gear": gear.name,
                "time_ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "layer_evals_ratio": evals[gear.name] / evals["full"],
            }
            found.append(row)
            print(
                f"{batch:>6}{gear.name:>10}{row['time_ratio']:>13.3f}"
                f"{row['low']:>9.3f}..{row['high']:.3f}{row['layer_evals_ratio']:>20.3f}"
            )
    print(json.dumps({"benchmark": "step", "threads": torch.get_num_threads(), "steps": STEPS, "rows": found}))


if __name__ == "__main__":
    main()
