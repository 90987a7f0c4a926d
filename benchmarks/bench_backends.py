"""What the backends gain over eager on fashion-dit, side by side.

    python benchmarks/bench_backends.py [--backends onnx,auto] [--cache DIR] [--threads N]

The network's work of a tick (a block of conditions, rows that take turns through the gears' depths) by network rows,
and whole images alone. Gains are eager's time over the backend's, repeat by repeat, in turn; median and range.
`own bits` says whether a row gives the same bits alone and in that batch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish, ratio, spread, table
from models.api import GenerateWork
from models.backends.auto import Probe
from models.backends.interface import Backend, BackendUnavailable, Setup
from models.evaluation.generate import run_work
from models.evaluation.turns import alternate
from models.registry import BACKENDS, resolve
from models.store import ZOO
from models.tasks.device import pick_device
from models.tasks.generate import GenerateTask
from models.tasks.generator import load

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS, STEPS = 15, 10


def build(names: list[str], setup: Setup) -> dict[str, Backend]:
    """Eager and the named backends; those that cannot work here are said and left out."""
    built: dict[str, Backend] = {}
    for name in ["eager", *names]:
        try:
            built[name] = resolve(BACKENDS, name)(setup)
            print(f"{name:>10}  {built[name].note}")
        except BackendUnavailable as error:
            print(f"{name:>10}  unavailable: {error}")
    print()
    return built


def own_bits(backend: Backend, probe: Probe) -> bool:
    """Whether every row alone gives the bits it has in the batch."""
    _, output, _ = probe.run(backend)
    alone = [probe.alone(backend, row) for row in range(len(probe.depths))]
    return torch.equal(torch.cat(alone), output)


def network(built: Mapping[str, Backend], probe: Probe) -> dict[str, Any]:
    """Gains on one probe."""
    seconds = alternate({name: partial(probe.run, backend) for name, backend in built.items()}, REPEATS)
    expected = probe.run(built["eager"])[1]
    errors = {name: probe.run(b)[1].sub(expected).abs().max() / expected.abs().max() for name, b in built.items()}
    return {
        "rows": len(probe.depths),
        "eager_ms": spread([1000 * s for s in seconds["eager"]]),
        "gain": {name: ratio(seconds["eager"], seconds[name]) for name in built},
        "error": {name: float(error) for name, error in errors.items()},
        "own_bits": {name: own_bits(backend, probe) for name, backend in built.items()},
    }


def images(task: GenerateTask, built: Mapping[str, Backend], guidance: float) -> dict[str, Any]:
    """Gains on one image drawn alone by the engine, everything included."""
    gear = task.info.default_gear
    work = GenerateWork(
        model=task.info.name, labels=(0,), seeds=(0,), steps=STEPS, solver="dpmpp_2m", guidance=guidance, gear=gear
    )

    def draw(backend: Backend) -> None:
        task.backend = backend
        run_work(task, work)

    seconds = alternate({name: partial(draw, backend) for name, backend in built.items()}, REPEATS)
    return {"guidance": guidance, "gain": {name: ratio(seconds["eager"], seconds[name]) for name in built}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="onnx,auto", help="compared with eager, by comma")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "offramp-bench", help="for exports")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = pick_device("auto")
    task = load(ZOO / "fashion-dit", max(ROWS), str(device))
    depths = {depth for gear in task.info.gears for depth in gear.schedule.depths} | {task.model.depth}
    setup = Setup(
        task.model,
        tuple(sorted(depths)),
        weights=task.info.weights,
        rows=max(ROWS),
        device=device,
        cache=given.cache,
    )
    built = build(given.backends.split(","), setup)
    found = [network(built, Probe.make(setup, rows)) for rows in ROWS]
    print("Network of a tick: eager's time over the backend's, by network rows\n")
    table(
        ("rows", "eager ms", *(f"{name}{what}" for name in built for what in ("", " own bits"))),
        [
            [r["rows"], f"{r['eager_ms'].value:.2f}", *(r[key][name] for name in built for key in ("gain", "own_bits"))]
            for r in found
        ],
    )
    print(f"relative error against eager: {max(max(r['error'].values()) for r in found):.1e} at most\n")
    single = [images(task, built, guidance) for guidance in (1.0, 2.0)]
    print(f"One image alone, {STEPS} steps, the whole engine\n")
    table(("guidance", *built), [[r["guidance"], *r["gain"].values()] for r in single])
    notes = {name: backend.note for name, backend in built.items()}
    finish("backends", device=str(device), notes=notes, network=found, images=single)


if __name__ == "__main__":
    main()
