"""How the GPU benchmarks time: events or synchronised clocks, turns, ceilings of the card, where a tick's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
TOP = 15  # lines of a profile's table


class Clock:
    """What is left of a time budget, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.ends - time.monotonic())

    def part(self, seconds: float) -> Clock:
        """A budget inside this one."""
        return Clock(min(seconds, self.left()))


@dataclass(frozen=True)
class Bench:
    """Where and how large a measurement is: `toy` is for a CPU, to see that everything runs."""

    device: torch.device
    toy: bool

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, run: Run) -> float:
        """Seconds of a run on the host's clock, the device idle before and after."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def seconds(self, run: Run, repeats: int = 15, least_s: float = 0.004) -> float:
        """Seconds of one run: the median of `repeats` regions of `least_s` or longer, timed by events on CUDA."""
        for _ in range(3):
            run()
        inner = max(1, min(1000, round(least_s / max(self.wall(run), 1e-7))))
        return median(self._region(run, inner) for _ in range(2 if self.toy else repeats))

    def _region(self, run: Run, inner: int) -> float:
        if not self.cuda:
            return self.wall(lambda: [run() for _ in range(inner)]) / inner
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / inner

    def turns(self, runs: Mapping[str, Run], repeats: int, clock: Clock) -> dict[str, list[float]]:
        """Wall seconds of runs that are warm, turn by turn; whole turns, one at least, as many as the clock allows."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        took = 0.0
        for turn in range(repeats):
            if turn and clock.left() < took:
                break
            began = time.monotonic()
            for name, run in runs.items():
                seconds[name].append(self.wall(run))
            took = time.monotonic() - began
        return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratios(base: Sequence[float], mine: Sequence[float]) -> dict[str, float]:
    """How many times faster `mine` is than `base`, turn by turn."""
    return summary([b / m for b, m in zip(base, mine, strict=True)])


def facts(bench: Bench) -> dict[str, Any]:
    """The machine."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(bench.device), "toy": bench.toy}
    if bench.cuda:
        card = torch.cuda.get_device_properties(bench.device)
        found |= {
            "name": card.name,
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def ceilings(bench: Bench) -> dict[str, float]:
    """Measured limits: bytes per second of a copy (read and written), FLOP/s of matrix products, one launch."""
    size, side = (2**22, 256) if bench.toy else (2**30, 8192)
    pair = [torch.randn(size // 4, device=bench.device) for _ in range(2)]
    found = {"copy_bytes_per_s": 2 * size / bench.seconds(lambda: pair[0].copy_(pair[1]))}
    pair.clear()  # gigabytes
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", None), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=bench.device).to(kind or torch.float32) for _ in range(2))
        with tf32(kind is None):
            found[f"{name}_flop_per_s"] = 2 * side**3 / bench.seconds(lambda a=a, b=b: a @ b, 7)  # type: ignore[misc]
    small = torch.zeros(1, device=bench.device)
    found["launch_s"] = bench.seconds(lambda: small.add_(1.0))
    if bench.cuda:
        found["replay_s"] = bench.seconds(_graph(lambda: small.add_(1.0)))
    return found


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Float32 matrix products in tf32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _graph(run: Run) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernels(bench: Bench, run: Run, times: int) -> dict[str, Any]:
    """Device seconds of one `run` and its dearest kernels, over `times` runs; operators' own time on a CPU."""
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    bench.wait()
    with profile(activities=[activity]) as seen:
        for _ in range(times):
            run()
        bench.wait()
    rows: list[tuple[str, float, float]] = []
    for event in seen.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if bench.cuda != on_device or getattr(event, "is_user_annotation", False):
            continue
        micro = event.self_device_time_total if bench.cuda else event.self_cpu_time_total
        rows.append((event.key, micro / times, event.count / times))
    rows.sort(key=lambda row: -row[1])
    return {
        "device_s": sum(micro for _, micro, _ in rows) / 1e6,
        "kernels": sum(count for *_, count in rows),
        "top": [{"name": name[:90], "us": round(micro, 2), "count": round(n, 2)} for name, micro, n in rows[:TOP]],
    }
