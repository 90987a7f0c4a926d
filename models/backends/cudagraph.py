"""CUDA graphs: every part captured once for each bucket of rows, batches padded up to their bucket.

A graph reads and writes fixed addresses. Inputs have a buffer each, shared by all buckets and by parts that name
the same input; what `enter` keeps is written straight into those buffers, so that later parts find it in place.
A graph saves launches, and padding costs rows: batches so large that launches do not matter run without either.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbones.interface import sorted_prefix
from models.backends.compiled import check_tools, compile_part
from models.backends.interface import Backend, BackendUnavailable, Executor, Setup
from models.backends.parts import Part, Program, Programs, make_programs

WARM_UPS = 2
MOST_ROWS = 256  # largest bucket


Run = Callable[[], list[Tensor]]
Captured = tuple[Callable[[], None], list[Tensor]]  # replay, and the outputs that it fills
Capture = Callable[[Run], Captured]


def build(setup: Setup) -> Backend:
    """Capture every part at every bucket. Unavailable off CUDA, and where a part cannot be captured."""
    return on_device(setup, "cudagraph")


def build_compiled(setup: Setup) -> Backend:
    """As `build`, of parts that torch.compile has fused first: fewer launches, and less to move in each."""
    check_tools(setup.device)
    return on_device(setup, "compiled_cudagraph", lambda part: dataclasses.replace(part, run=compile_part(part)))


def on_device(setup: Setup, name: str, prepare: Callable[[Part], Part] = lambda part: part) -> Backend:
    """Capture with CUDA, one memory pool for all."""
    if setup.device.type != "cuda":
        raise BackendUnavailable(f"CUDA graphs need a CUDA device, this is {setup.device.type}")
    with torch.cuda.device(setup.device):
        gc.collect()
        capture_there = partial(capture, pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream())
        return record(setup, capture_there, name, prepare)


def record(
    setup: Setup, capture: Capture, name: str = "cudagraph", prepare: Callable[[Part], Part] = lambda part: part
) -> Backend:
    """The backend whose graphs `capture` makes: it runs a function once and returns its replay and its outputs."""
    began = time.monotonic()
    recorder = Recorder(setup, capture, prepare)
    programs = make_programs(setup, setup.segments, recorder.record)
    took = time.monotonic() - began
    count, most = len(programs.programs) * len(recorder.buckets), recorder.buckets[-1]
    note = f"{count} CUDA graphs for up to {most} rows in {took:.1f} s"
    return CudaGraph(name, note, setup, programs, recorder)


def capture(run: Run, pool: Any, stream: torch.cuda.Stream) -> Captured:
    """Capture after warm-ups on the same side stream, so that libraries have their handles and workspaces.

    Graphs share a pool: a graph's outputs stay valid as long as only graphs captured after it are replayed.
    Only what this thread does while it captures counts: other threads may use the device meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
            stream.synchronize()
            with uncollected():
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    outputs = run()
                finally:
                    graph.capture_end()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
    except Exception as error:  # compilers have errors of their own
        reason = error.__context__ or error  # the end of a broken capture fails too, and says less
        raise BackendUnavailable(f"CUDA graph capture failed: {str(reason).splitlines()[0]}") from error
    return graph.replay, outputs


@contextmanager
def uncollected() -> Iterator[None]:
    """No cycles are collected meanwhile: a graph or an event that goes would break a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def buckets_up_to(rows: int) -> list[int]:
    """1, 2, 4, 8, 16, then four to the octave, from 64 on eight, to the first that holds `rows` or MOST_ROWS."""
    found, most = [1], min(rows, MOST_ROWS)
    while found[-1] < most:
        last = found[-1]
        octave = 1 << (last.bit_length() - 1)
        found.append(last + (octave if octave < 16 else octave // 4 if octave < 64 else octave // 8))
    return found


class CudaGraph(Executor):
    """Runs on the buffers: the condition is copied in once a forward; what goes out is a copy.

    `capture` is for what else wants to be captured beside it, with `uncaptured` inside; `fuses`: compiled before.
    """

    def __init__(self, name: str, note: str, setup: Setup, programs: Programs, recorder: Recorder) -> None:
        super().__init__(name, note, setup, programs)
        self.recorder, self.capture = recorder, recorder.capture
        self.pieces = Programs(setup, recorder.prepared)
        self.fuses = name.startswith("compiled")

    @torch.inference_mode()
    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """See Backend."""
        return super().condition(t, label).clone()

    @torch.inference_mode()
    def __call__(self, x: Tensor, condition: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """See Backend."""
        if len(x) <= self.recorder.buckets[-1]:
            condition = self.recorder.place("condition", condition)
        output, ran = super().__call__(x, condition, depths)
        return output.clone(), ran

    @torch.inference_mode()
    def uncaptured(self, x: Tensor, t: Tensor, label: Tensor, depth: int) -> tuple[Tensor, list[int]]:
        """Condition and forward of rows of one depth, part by part as they were before they were captured."""
        condition = self.pieces.condition(t, label)
        return sorted_prefix(self.pieces, self.segments, x, condition, [depth] * len(x))


class Recorder:
    """The buffers, and the capture of parts, each `prepare`d before."""

    def __init__(self, setup: Setup, capture: Capture, prepare: Callable[[Part], Part]) -> None:
        self.buckets = buckets_up_to(setup.rows)
        self.rows = max(setup.rows, self.buckets[-1])
        self.capture, self.prepare = capture, prepare
        self.prepared: dict[str, Program] = {}
        self.buffers: dict[str, Tensor] = {}

    def place(self, name: str, value: Tensor) -> Tensor:
        """Copy rows to the start of a buffer unless they lie there already; returns them in the buffer."""
        rows = self.buffers[name][: len(value)]
        if rows.data_ptr() != value.data_ptr():
            rows.copy_(value)
        return rows

    @torch.inference_mode()
    def record(self, part: Part) -> Program:
        """Capture a part at every bucket, the largest first so that the others fit in the memory it used."""
        part = self.prepare(part)
        self.prepared[part.name] = part.run
        given = part.example(self.buckets[-1])
        made = zip(part.outputs, part.run(*given), strict=True)
        fixed = [*zip(part.inputs, given, strict=True), *((name, value) for name, value in made if _is_kept(name))]
        for name, value in fixed:
            self.buffers.setdefault(name, value.clone(memory_format=torch.contiguous_format))
        return Graphs(self, part, {bucket: self._capture(part, bucket) for bucket in reversed(self.buckets)})

    def _capture(self, part: Part, bucket: int) -> Captured:
        def run() -> list[Tensor]:
            outputs = part.run(*(self.buffers[name][:bucket] for name in part.inputs))
            named = zip(part.outputs, outputs, strict=True)
            return [self.place(name, value) if _is_kept(name) else value.contiguous() for name, value in named]

        return self.capture(run)


class Graphs:
    """A part's graphs by bucket, as a program. Its outputs are valid until it runs again."""

    def __init__(self, recorder: Recorder, part: Part, captured: Mapping[int, Captured]) -> None:
        self.recorder, self.part, self.captured = recorder, part, captured

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Copy the inputs in, replay, and return the outputs without the padding; no graph for more than they hold."""
        n, buckets = len(tensors[0]), self.recorder.buckets
        if n > self.recorder.rows:
            raise ValueError(f"{n} network rows, but CUDA graphs were captured for {self.recorder.rows} at most")
        if n > buckets[-1]:
            return self.part.run(*tensors)
        for name, value in zip(self.part.inputs, tensors, strict=True):
            self.recorder.place(name, value)
        replay, outputs = self.captured[buckets[bisect_left(buckets, n)]]
        replay()
        return [output[:n] for output in outputs]


def _is_kept(name: str) -> bool:
    return name.startswith("kept")
