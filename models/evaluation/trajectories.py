"""Sample with every exit's output in hand, so that a policy can choose a depth per row and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import Gear
from models.backbones.interface import Backbone, single_blocks
from models.registry import SOLVERS, resolve
from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.process import from_config
from models.solvers.table import INDEX, Trajectory
from models.tasks.gears import read_gears
from models.tasks.generator import load_model
from models.training.data import Images

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# (evaluation, guided outputs (len(depths), N, C, H, W)) -> index into depths per row (N,)
Policy = Callable[[int, Tensor], Ints]


@dataclass(frozen=True)
class Sampler:
    """A network, what it is asked for, and the exits under study (rising; the last is full depth)."""

    model: Backbone
    gear: Gear
    trajectory: Trajectory
    depths: tuple[int, ...]
    bf16: bool = False

    @torch.inference_mode()
    def sample(self, n: int, seed: int, policy: Policy) -> Images:
        """Images (n, H, W, C) of one batch: image i has seed + i and label i mod K."""
        model, labels = self.model, torch.arange(n) % self.model.null_label
        seeds = seed + torch.arange(n)
        x = self.trajectory.scale * normal(seeds, torch.full_like(seeds, -1), model.row_shape)
        s = h1 = h2 = torch.zeros_like(x)
        y = torch.cat([labels, torch.full((n,), model.null_label)])
        for e, row in enumerate(self.trajectory.coef):
            condition = model.condition(torch.full((2 * n,), row[INDEX["t"]], dtype=torch.float32), y)
            both = outputs(
                model, (x * row[INDEX["c_in"]]).float().repeat(2, 1, 1, 1), condition, self.depths, self.bf16
            )
            guided = both[:, n:] + self.gear.guidance * (both[:, :n] - both[:, n:])
            chosen = torch.from_numpy(policy(e, guided))
            z = normal(seeds, torch.full_like(seeds, e), model.row_shape)
            coef = torch.as_tensor(row, dtype=torch.float32).expand(n, -1)
            x, s, h1, h2 = update(coef, x, s, h1, h2, guided[chosen, torch.arange(n)], z)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def gains(self) -> Floats:
        """|d x' / d o| of each evaluation (evaluations,): how much of an output's error reaches the state."""
        column = {name: self.trajectory.coef[:, INDEX[name]] for name in ("a_o", "c_o", "a_m", "a_y", "k_m")}
        return np.abs(column["a_o"] + column["c_o"] * (column["a_m"] + column["a_y"] * column["k_m"]))


def make_sampler(folder: Path, name: str, shallowest: int, bf16: bool = False) -> Sampler:
    """The gear `name` of a pixel model's folder, with every exit from `shallowest` on."""
    model, config, _ = load_model(folder)
    gear = next(gear for gear in read_gears(folder, model.depth)[0] if gear.name == name)
    trajectory = resolve(SOLVERS, gear.solver)(from_config(config["process"]), gear.steps, gear.solver_options)
    return Sampler(model, gear, trajectory, tuple(range(shallowest, model.depth + 1)), bf16)


def outputs(model: Backbone, x: Tensor, condition: Tensor, depths: Sequence[int], bf16: bool) -> Tensor:
    """Network output of N rows at every exit, float32 (len(depths), N, C, H, W)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if model.bypasses:
            return torch.stack([model(x, condition, [depth] * len(x))[0].float() for depth in depths])
        hidden, *kept = model.enter(x, condition)
        found = []
        for segment in single_blocks(model):
            hidden = model.segment(segment, hidden, kept, condition)
            if segment.rank + 1 in depths:
                found.append(model.leave(hidden, condition).float())
    return torch.stack(found)


def rms(x: Tensor) -> Floats:
    """Root mean square over the last three axes."""
    return x.square().mean((-3, -2, -1)).sqrt().double().numpy()
