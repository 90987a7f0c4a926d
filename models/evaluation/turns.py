"""Timing side by side: things to compare take turns, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each run, (repeats,) each, turn by turn; a first turn warms up and is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            finish()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def measure_times(runs: Mapping[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Seconds of each, the fastest of turns that alternate, so that neighbours on the machine matter little."""
    return {name: float(values.min()) for name, values in alternate(runs, repeats).items()}


def finish() -> None:
    """Wait for CUDA, where it is in use: a clock may be read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
