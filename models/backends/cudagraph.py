"""CUDA graphs: every part captured once for each bucket of rows, batches padded up to their bucket.

A graph reads and writes fixed addresses. Inputs have a buffer each, shared by all buckets and by parts that name
the same input; what `enter` keeps is written straight into those buffers, so that later parts find it in place.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from models.backends.interface import Backend, BackendUnavailable, Executor, Setup
from models.backends.parts import Part, Programs, make_programs

WARM_UPS = 2


def build(setup: Setup) -> Backend:
    """Capture every part at every bucket. Unavailable off CUDA."""
    if setup.device.type != "cuda":
        raise BackendUnavailable(f"CUDA graphs need a CUDA device, this is {setup.device.type}")
    began = time.monotonic()
    recorder = Recorder(setup)
    programs = make_programs(setup, setup.segments, recorder.record)
    took = time.monotonic() - began
    count = len(programs.programs) * len(recorder.buckets)
    return CudaGraph(f"{count} CUDA graphs for rows {recorder.buckets} in {took:.1f} s", setup, programs, recorder)


def buckets_up_to(rows: int) -> list[int]:
    """1, 2, 4, ... and the first that holds `rows`."""
    return [1 << i for i in range((rows - 1).bit_length() + 1)]


class CudaGraph(Executor):
    """Runs on the buffers: the condition is copied in once a forward, the output out once."""

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
    """The buffers, the shared memory pool, and the capture of parts."""

    def __init__(self, setup: Setup) -> None:
        self.buckets = buckets_up_to(setup.rows)
        self.buffers: dict[str, Tensor] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def place(self, name: str, value: Tensor) -> Tensor:
        """Copy rows to the start of a buffer unless they lie there already; returns them in the buffer."""
        rows = self.buffers[name][: len(value)]
        if rows.data_ptr() != value.data_ptr():
            rows.copy_(value)
        return rows

    @torch.inference_mode()
    def record(self, part: Part) -> Graphs:
        """Capture a part at every bucket, largest first so that the smaller ones reuse its memory."""
        for name, value in zip((*part.inputs, *part.outputs), self._tensors(part), strict=True):
            if name not in self.buffers and (name in part.inputs or name.startswith("kept")):
                self.buffers[name] = value.clone(memory_format=torch.contiguous_format)
        captured = {bucket: self._capture(part, bucket) for bucket in reversed(self.buckets)}
        return Graphs(self, part, captured)

    def _tensors(self, part: Part) -> list[Tensor]:
        given = part.example(self.buckets[-1])
        return [*given, *part.run(*given)]

    def _run(self, part: Part, bucket: int) -> list[Tensor]:
        outputs = part.run(*(self.buffers[name][:bucket] for name in part.inputs))
        kept = zip(part.outputs, outputs, strict=True)
        return [self.place(name, value) if name in self.buffers else value.contiguous() for name, value in kept]

    def _capture(self, part: Part, bucket: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(part, bucket)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self._run(part, bucket)
        return graph, outputs


class Graphs:
    """A part's graphs by bucket, as a program. An output is valid until the part runs again."""

    def __init__(
        self, recorder: Recorder, part: Part, captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]]
    ) -> None:
        self.recorder, self.part, self.captured = recorder, part, captured

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Copy the inputs in, replay, and return views of the outputs without the padding."""
        n, buckets = len(tensors[0]), self.recorder.buckets
        if n > buckets[-1]:
            raise ValueError(f"{n} network rows, but the CUDA graphs were captured for at most {buckets[-1]}")
        for name, value in zip(self.part.inputs, tensors, strict=True):
            self.recorder.place(name, value)
        graph, outputs = self.captured[buckets[bisect_left(buckets, n)]]
        graph.replay()
        return [output[:n] for output in outputs]
