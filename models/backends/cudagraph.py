"""CUDA graphs: every part captured once for each bucket of rows, batches padded up to their bucket.

A graph reads and writes fixed addresses. Inputs have a buffer each, shared by all buckets and by parts that name
the same input; what `enter` keeps is written straight into those buffers, so that later parts find it in place.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.backends.interface import Backend, BackendUnavailable, Executor, Setup
from models.backends.parts import Part, Program, Programs, make_programs

WARM_UPS = 2


Run = Callable[[], list[Tensor]]
Capture = Callable[[Run], tuple[Callable[[], None], list[Tensor]]]


def build(setup: Setup) -> Backend:
    """Capture every part at every bucket. Unavailable off CUDA, and where a part cannot be captured."""
    if setup.device.type != "cuda":
        raise BackendUnavailable(f"CUDA graphs need a CUDA device, this is {setup.device.type}")
    with torch.cuda.device(setup.device):
        pool = torch.cuda.graph_pool_handle()
        return record(setup, lambda run: capture(run, pool))


def record(setup: Setup, capture: Capture) -> Backend:
    """The backend whose graphs `capture` makes: it runs a function once and returns its replay and its outputs."""
    began = time.monotonic()
    recorder = Recorder(setup, capture)
    programs = make_programs(setup, setup.segments, recorder.record)
    took = time.monotonic() - began
    count = len(programs.programs) * len(recorder.buckets)
    return CudaGraph(f"{count} CUDA graphs for rows {recorder.buckets} in {took:.1f} s", setup, programs, recorder)


def capture(run: Run, pool: Any) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture after warm-ups on a side stream.

    Graphs share a pool: a graph's outputs stay valid as long as only graphs captured after it are replayed.
    """
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = run()
    except RuntimeError as error:
        raise BackendUnavailable(f"CUDA graph capture failed: {str(error).splitlines()[0]}") from error
    return graph.replay, outputs


def buckets_up_to(rows: int) -> list[int]:
    """1, 2, 4, ... and the first that holds `rows`."""
    return [1 << i for i in range((rows - 1).bit_length() + 1)]


class CudaGraph(Executor):
    """Runs on the buffers: the condition is copied in once a forward; what goes out is a copy."""

    def __init__(self, note: str, setup: Setup, programs: Programs, recorder: Recorder) -> None:
        super().__init__("cudagraph", note, setup, programs)
        self.recorder = recorder

    @torch.inference_mode()
    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """See Backend."""
        return super().condition(t, label).clone()

    @torch.inference_mode()
    def __call__(self, x: Tensor, condition: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """See Backend."""
        output, ran = super().__call__(x, self.recorder.place("condition", condition), depths)
        return output.clone(), ran


class Recorder:
    """The buffers, and the capture of parts."""

    def __init__(self, setup: Setup, capture: Capture) -> None:
        self.buckets, self.capture = buckets_up_to(setup.rows), capture
        self.buffers: dict[str, Tensor] = {}

    def place(self, name: str, value: Tensor) -> Tensor:
        """Copy rows to the start of a buffer unless they lie there already; returns them in the buffer."""
        if len(value) > self.buckets[-1]:
            raise ValueError(f"{len(value)} network rows, but CUDA graphs were captured for {self.buckets[-1]} at most")
        rows = self.buffers[name][: len(value)]
        if rows.data_ptr() != value.data_ptr():
            rows.copy_(value)
        return rows

    @torch.inference_mode()
    def record(self, part: Part) -> Program:
        """Capture a part at every bucket, the largest first so that the others fit in the memory it used."""
        given = part.example(self.buckets[-1])
        made = zip(part.outputs, part.run(*given), strict=True)
        fixed = [*zip(part.inputs, given, strict=True), *((name, value) for name, value in made if _is_kept(name))]
        for name, value in fixed:
            self.buffers.setdefault(name, value.clone(memory_format=torch.contiguous_format))
        return Graphs(self, part, {bucket: self._capture(part, bucket) for bucket in reversed(self.buckets)})

    def _capture(self, part: Part, bucket: int) -> tuple[Callable[[], None], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = part.run(*(self.buffers[name][:bucket] for name in part.inputs))
            named = zip(part.outputs, outputs, strict=True)
            return [self.place(name, value) if _is_kept(name) else value.contiguous() for name, value in named]

        return self.capture(run)


class Graphs:
    """A part's graphs by bucket, as a program. Its outputs are valid until it runs again."""

    def __init__(
        self, recorder: Recorder, part: Part, captured: dict[int, tuple[Callable[[], None], list[Tensor]]]
    ) -> None:
        self.recorder, self.part, self.captured = recorder, part, captured

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Copy the inputs in, replay, and return the outputs without the padding."""
        n, buckets = len(tensors[0]), self.recorder.buckets
        for name, value in zip(self.part.inputs, tensors, strict=True):
            self.recorder.place(name, value)
        replay, outputs = self.captured[buckets[bisect_left(buckets, n)]]
        replay()
        return [output[:n] for output in outputs]


def _is_kept(name: str) -> bool:
    return name.startswith("kept")
