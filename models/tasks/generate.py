"""/generate: early-exit diffusion sampling over a pool of slots.

Every row carries its own time, solver, guidance and depth; a tick gathers the rows, runs the network
sorted by depth, applies one fused update and scatters back. State is float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.api import GeneratedRow, GenerateWork, ModelInfo, StepStats
from models.backbones.dit import DiT
from models.exits.plan import check, plan
from models.registry import BACKBONES, SOLVERS, resolve
from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.table import FIELDS, INDEX, Process, uniform_grid
from models.store import read_config, read_tensors, weights_digest
from models.tasks.device import pick_device
from models.tasks.gears import read_gears

CONDITION_BLOCK = 8
MAX_STEPS = 1000


class GenerateTask:
    """A generator and its pool of `capacity` slots; see models.api.Task for the contract."""

    def __init__(self, info: ModelInfo, model: DiT, process: Process, capacity: int, device: torch.device) -> None:
        self.info, self.model, self.process, self.capacity = info, model, process, capacity
        self.device = device
        self.gears = {gear.name: gear for gear in info.gears}
        pool = (capacity, *model.row_shape)
        self.x, self.s, self.h1, self.h2 = (torch.zeros(pool, device=self.device) for _ in range(4))
        self.coef = torch.zeros(capacity, MAX_STEPS, len(FIELDS), device=self.device)
        self.seeds = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        self.times = np.zeros((capacity, MAX_STEPS), np.float32)
        self.depths = np.zeros((capacity, MAX_STEPS), np.int64)
        self.exits = np.zeros((capacity, MAX_STEPS), np.int64)
        self.noisy = np.zeros((capacity, MAX_STEPS), bool)
        self.done = np.zeros(capacity, np.int64)
        self.labels = np.zeros(capacity, np.int64)
        self.guidance = np.ones(capacity, np.float32)

    @torch.inference_mode()
    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Coefficients and depths of every evaluation, and the initial noise."""
        times = uniform_grid(work.steps)
        table = resolve(SOLVERS, work.solver)(self.process, times)
        evaluations = len(table)
        to, on_device = list(slots), torch.as_tensor(slots, device=self.device)
        u = table[:, INDEX["t"]]
        self.times[to, :evaluations] = u
        self.depths[to, :evaluations] = plan(self.gears[work.gear].schedule, u)
        self.noisy[to, :evaluations] = table[:, INDEX["a_n"]] > 0
        self.done[to] = 0
        self.labels[to] = [work.labels[i] for i in indices]
        self.guidance[to] = work.guidance
        self.coef[on_device, :evaluations] = torch.as_tensor(table, dtype=torch.float32, device=self.device)
        seeds = torch.tensor([work.seeds[i] for i in indices], dtype=torch.int64, device=self.device)
        self.seeds[on_device] = seeds
        self.x[on_device] = normal(seeds, torch.full_like(seeds, -1), self.model.row_shape)
        for history in (self.s, self.h1, self.h2):
            history[on_device] = 0.0
        return [evaluations] * len(to)

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> StepStats:
        """One network evaluation and one update for every row."""
        wanted = np.asarray(slots)
        at = self.done[wanted]
        order = np.argsort(-self.depths[wanted, at], kind="stable")
        rows, at = wanted[order], at[order]
        here, e = torch.as_tensor(rows, device=self.device), torch.as_tensor(at, device=self.device)
        coef, x = self.coef[here, e], self.x[here]
        output, ran = self._network(rows, at, x * coef[:, INDEX["c_in"], None, None, None])
        new = update(coef, x, self.s[here], self.h1[here], self.h2[here], output, self._noise(rows, at, here, e))
        for pool, value in zip((self.x, self.s, self.h1, self.h2), new, strict=True):
            pool[here] = value
        self.exits[rows, at] = ran
        self.done[rows] += 1
        return self._stats(rows, at, ran)

    def _network(self, rows: np.ndarray, at: np.ndarray, x: Tensor) -> tuple[Tensor, np.ndarray]:
        """Guided output (N, C, H, W) for rows sorted by depth, and the blocks that each row ran."""
        guided = self.guidance[rows] != 1.0
        copies = np.where(guided, 2, 1)
        source = np.repeat(np.arange(len(rows)), copies)
        first = np.cumsum(copies) - copies
        last = first + copies - 1
        labels = self.labels[rows][source]
        labels[last[guided]] = self.model.null_label
        modulation = self._condition(self.times[rows, at][source], labels)
        depths = self.depths[rows, at][source].tolist()
        output, per_block = self.model(x[torch.as_tensor(source, device=self.device)], modulation, depths)
        ran = (np.asarray(per_block)[None, :] > np.arange(len(source))[:, None]).sum(1)
        conditional = output[torch.as_tensor(first, device=self.device)]
        unconditional = output[torch.as_tensor(last, device=self.device)]
        scale = torch.as_tensor(self.guidance[rows], device=self.device)[:, None, None, None]
        return unconditional + scale * (conditional - unconditional), ran[first]

    def _condition(self, times: np.ndarray, labels: np.ndarray) -> Tensor:
        """Modulation (N, ...) of network rows: each distinct (time, label) once, in blocks of fixed shape.

        One-token matmuls give other bits at other batch sizes; a fixed shape keeps a row's bits its own.
        """
        keys = np.stack([times.view(np.int32).astype(np.int64), labels])
        distinct, inverse = np.unique(keys, axis=1, return_inverse=True)
        count = distinct.shape[1]
        padded = np.pad(distinct, ((0, 0), (0, -count % CONDITION_BLOCK)), mode="edge")
        u = torch.as_tensor(padded[0].astype(np.int32).view(np.float32), device=self.device)
        y = torch.as_tensor(padded[1], device=self.device)
        blocks = [
            self.model.condition(*block)
            for block in zip(u.split(CONDITION_BLOCK), y.split(CONDITION_BLOCK), strict=True)
        ]
        return torch.cat(blocks)[torch.as_tensor(inverse.reshape(-1), device=self.device)]

    def _noise(self, rows: np.ndarray, at: np.ndarray, here: Tensor, e: Tensor) -> Tensor:
        """Noise of the rows whose update adds some, zeros elsewhere."""
        z = torch.zeros(len(rows), *self.model.row_shape, device=self.device)
        noisy = np.flatnonzero(self.noisy[rows, at])
        if len(noisy):
            some = torch.as_tensor(noisy, device=self.device)
            z[some] = normal(self.seeds[here[some]], e[some], self.model.row_shape)
        return z

    def _network_rows(self, rows: np.ndarray) -> np.ndarray:
        return np.where(self.guidance[rows] != 1.0, 2, 1)

    def _stats(self, rows: np.ndarray, at: np.ndarray, ran: np.ndarray) -> StepStats:
        copies = self._network_rows(rows)
        bins = np.minimum((self.times[rows, at] * 10).astype(int), 9)
        return StepStats(
            rows=len(rows),
            layer_evals=int((ran * copies).sum()),
            layer_evals_full=int(self.model.depth * copies.sum()),
            depth_counts=Counter(zip(bins.tolist(), ran.tolist(), strict=True)),
        )

    @torch.inference_mode()
    def collect(self, slots: Sequence[int]) -> Sequence[GeneratedRow]:
        """Finished rows as uint8 pixels (H, W, C) with what they cost."""
        x = self.x[torch.as_tensor(slots, device=self.device)].clamp(-1, 1)
        pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        copies = self._network_rows(np.asarray(slots))
        made = []
        for image, slot, n in zip(pixels, slots, copies.tolist(), strict=True):
            exits = self.exits[slot, : self.done[slot]].tolist()
            made.append(
                GeneratedRow(
                    pixels=image,
                    label=int(self.labels[slot]),
                    seed=int(self.seeds[slot]),
                    exit_depths=tuple(exits),
                    layer_evals=n * sum(exits),
                    layer_evals_full=n * self.model.depth * len(exits),
                )
            )
        return made

    def receipt(self, work: GenerateWork, rows: Sequence[GeneratedRow]) -> dict[str, object]:
        """What the answer cost, as counted by the executor."""
        ran, whole = sum(r.layer_evals for r in rows), sum(r.layer_evals_full for r in rows)
        exits = sorted({r.exit_depths for r in rows})
        return {
            "gear": work.gear,
            "solver": work.solver,
            "steps": work.steps,
            "guidance": work.guidance,
            "overrides": list(work.overrides),
            "depth": self.model.depth,
            "exit_depths": list(exits[0]) if len(exits) == 1 else [list(r.exit_depths) for r in rows],
            "layer_evals": ran,
            "layer_evals_full": whole,
            "compute_saved": (whole - ran) / whole,
        }


def load_model(folder: Path) -> tuple[DiT, dict[str, object], str]:
    """The network of a generator folder (eval mode, float32), its config and weights digest."""
    config = read_config(folder, "generator")
    model: DiT = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
    for name in config["files"]:
        model.load_state_dict(read_tensors(folder, name, config["files"]))
    return model.eval().requires_grad_(False), config, weights_digest(config["files"])


def load(folder: Path, slots: int, device: str) -> GenerateTask:
    """A generator folder as a Task with `slots` slots."""
    model, config, weights = load_model(folder)
    gears, default = read_gears(folder)
    for gear in gears:
        check(gear, weights, model.depth)
    channels, height, width = model.row_shape
    info = ModelInfo(
        name=str(config["name"]),
        task="generate",
        labels=tuple(config["labels"]),  # type: ignore[arg-type]
        image=(height, width, channels),
        weights=weights,
        description=str(config.get("description", "")),
        depth=model.depth,
        gears=gears,
        default_gear=default,
    )
    where = pick_device(device)
    process = Process(**config["process"])  # type: ignore[arg-type]
    return GenerateTask(info, model.to(where), process, slots, where)
