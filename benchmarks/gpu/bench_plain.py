"""What is compared: a plain PyTorch loop with static batches at full depth, and the engine with rows that come and go.

The plain loop is what a user would write around the same network: DDIM with coefficients computed before, guidance by
doubling the batch, requests grouped as they arrive. A request that asks for fewer steps than the longest of its batch
keeps its place until that one is done. Nothing waits for the device but the pixels of a batch.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import GenerateWork
from models.backbones.interface import Backbone
from models.backends.precision import at_precision
from models.solvers.noise import normal
from models.solvers.table import INDEX
from models.tasks.generate import GenerateTask
from models.tasks.generator import load_model

Pixels = NDArray[np.uint8]
USED = ("t", "c_x", "c_o", "a_y", "a_o", "a_m", "clip")
WAYS = ("fp32", "autocast", "bf16", "compiled")


def requests(
    task: GenerateTask, n: int, steps: tuple[int, int], gear: str = "full", guidance: float = 2.0
) -> list[GenerateWork]:
    """One image each by DDIM, with steps drawn from a range, fixed seeds; the same whatever the gear."""
    draw = random.Random(0)
    return [
        GenerateWork(
            model=task.info.name,
            labels=(draw.randrange(len(task.info.labels)),),
            seeds=(seed,),
            steps=draw.randint(*steps),
            solver="ddim",
            guidance=guidance,
            gear=gear,
        )
        for seed in range(n)
    ]


def forward(network: Backbone, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The network as anybody would run it: every block on every row."""
    condition = network.condition(t, label)
    hidden, *kept = network.enter(x, condition)
    for index in range(network.always, network.depth):
        hidden = network.block(index, hidden, kept, condition)
    return network.leave(hidden, condition)


class Plain:
    """The loop over a task's network, loaded anew. `way`: fp32, autocast and bf16 (weights too), or bf16 compiled."""

    def __init__(self, task: GenerateTask, folder: Any, way: str, batch: int) -> None:
        self.task, self.batch, self.device = task, batch, task.device
        network = load_model(folder)[0].to(task.device)
        self.network = at_precision(network, "bf16" if way in ("bf16", "compiled") else "fp32")
        if way == "autocast":
            network.requires_grad_(True)  # autocast keeps the casts of parameters that it takes for trainable
        self.forward: Callable[..., Tensor] = torch.compile(forward) if way == "compiled" else forward
        self.autocast = way == "autocast"

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def run(self, works: Sequence[GenerateWork]) -> Pixels:
        """Images (n, H, W, C), in the order of the requests."""
        batches = [works[i : i + self.batch] for i in range(0, len(works), self.batch)]
        return np.concatenate([self.draw(batch) for batch in batches])

    def _tables(self, works: Sequence[GenerateWork]) -> dict[str, Tensor]:
        """Coefficients (steps of the longest, rows); a request that is done stays where it is."""
        longest = max(work.steps for work in works)
        tables = {name: np.zeros((longest, len(works)), np.float32) for name in USED}
        tables["a_y"][:] = 1.0
        for row, work in enumerate(works):
            coef = self.task.trajectory(work.solver, work.steps, work.solver_options).coef
            for name in USED:
                tables[name][: len(coef), row] = coef[:, INDEX[name]]
                tables[name][len(coef) :, row] = 1.0 if name == "a_y" else coef[-1, INDEX["t"]] if name == "t" else 0.0
        return {name: torch.as_tensor(table, device=self.device) for name, table in tables.items()}

    @torch.no_grad()
    def draw(self, works: Sequence[GenerateWork]) -> Pixels:
        """One static batch."""
        tables, guidance, null = self._tables(works), works[0].guidance, self.network.null_label
        label = torch.tensor([work.labels[0] for work in works], device=self.device)
        labels = torch.cat([label, torch.full_like(label, null)])
        seeds = torch.tensor([work.seeds[0] for work in works], device=self.device)
        scale = self.task.trajectory(works[0].solver, works[0].steps, works[0].solver_options).scale
        x = scale * normal(seeds, torch.full_like(seeds, -1), self.network.row_shape)
        with self._precision():
            for i in range(len(tables["t"])):
                here = {name: table[i, :, None, None, None] for name, table in tables.items()}
                t = tables["t"][i]
                output = self.forward(self.network, torch.cat([x, x]), torch.cat([t, t]), labels).float()
                conditional, plain = output.chunk(2)
                o = plain + guidance * (conditional - plain)
                m = (here["c_x"] * x + here["c_o"] * o).clamp(-here["clip"], here["clip"])
                x = here["a_y"] * x + here["a_o"] * o + here["a_m"] * m
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        pixels: Pixels = levels.cpu().numpy()
        return pixels


Done = Callable[[int, Pixels], None]


class Rows:
    """Requests of one image in the slots of a task, admitted as slots are free."""

    def __init__(self, task: GenerateTask, slots: int, done: Done) -> None:
        self.task, self.done = task, done
        self.free = list(range(slots))[::-1]
        self.left: dict[int, int] = {}
        self.number: dict[int, int] = {}

    def admit(self, number: int, work: GenerateWork) -> None:
        """Place a request in a free slot."""
        slot = self.free.pop()
        [self.left[slot]] = self.task.admit(work, [0], [slot])
        self.number[slot] = number

    def tick(self) -> None:
        """One step of every row; answers those that it ends."""
        waiting = self.task.step(list(self.left)).waiting
        for slot in self.left:
            self.left[slot] -= slot not in waiting
        ended = [slot for slot, n in self.left.items() if n <= 0]
        for slot, row in zip(ended, self.task.collect(ended), strict=True) if ended else ():
            del self.left[slot]
            self.free.append(slot)
            self.done(self.number.pop(slot), row.pixels)


def continuous(task: GenerateTask, works: Sequence[GenerateWork], slots: int) -> Pixels:
    """Images of requests that are all there at the start, in their order."""
    found: list[Any] = [None] * len(works)
    rows, waiting = Rows(task, slots, found.__setitem__), deque(enumerate(works))
    while waiting or rows.left:
        while waiting and rows.free:
            rows.admit(*waiting.popleft())
        rows.tick()
    return np.stack(found)


def percentiles(latencies: Sequence[float], offered_per_s: float, seconds: float) -> dict[str, float]:
    """What a load run says."""
    p50, p99 = np.percentile(latencies, [50, 99]).tolist()
    answered = len(latencies)
    return {
        "p50_s": p50, "p99_s": p99, "requests": answered, "offered_per_s": offered_per_s, "per_s": answered / seconds
    }  # fmt: skip


def poisson(task: GenerateTask, works: Sequence[GenerateWork], slots: int, rate: float) -> dict[str, float]:
    """Latency of requests that arrive at random, `rate` a second, until all are answered."""
    due, latencies, draw, at = list[float](), list[float](), random.Random(1), 0.0
    for _ in works:
        at += draw.expovariate(rate)
        due.append(at)

    def done(number: int, pixels: Pixels) -> None:
        latencies.append(time.perf_counter() - began - due[number])

    rows, waiting = Rows(task, slots, done), deque(range(len(works)))
    began = time.perf_counter()
    while waiting or rows.left:
        now = time.perf_counter() - began
        while waiting and rows.free and due[waiting[0]] <= now:
            rows.admit(waiting[0], works[waiting.popleft()])
        if rows.left:
            rows.tick()
        elif waiting:
            time.sleep(max(0.0, due[waiting[0]] - now))
    return percentiles(latencies, rate, time.perf_counter() - began)


def poisson_plain(plain: Plain, works: Sequence[GenerateWork], rate: float) -> dict[str, float]:
    """The same for the plain loop: whoever waits when a batch ends, up to its size, is the next batch."""
    draw, at, latencies = random.Random(1), 0.0, list[float]()
    waiting: deque[tuple[float, GenerateWork]] = deque()
    for work in works:
        at += draw.expovariate(rate)
        waiting.append((at, work))
    began = time.perf_counter()
    while waiting:
        now = time.perf_counter() - began
        if waiting[0][0] > now:
            time.sleep(waiting[0][0] - now)
            continue
        batch = [waiting.popleft() for _ in range(sum(due <= now for due, _ in list(waiting)[: plain.batch]))]
        plain.draw([work for _, work in batch])
        ended = time.perf_counter() - began
        latencies += [ended - due for due, _ in batch]
    return percentiles(latencies, rate, time.perf_counter() - began)
