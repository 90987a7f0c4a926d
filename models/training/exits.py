"""Fine-tune a diffusion transformer so that one set of weights serves several exit schedules.

Moon et al. (ICML 2024): rows at time u run the first S(u) blocks and the shared head; the loss is the
diffusion loss; the time embedder is frozen; the averaged weights are kept. Ours: depths drawn uniformly
first (`explore`), schedules then spend depth where a shallower exit costs most (`allocate`), and rows of all
gears share every minibatch (sorted-prefix, so dropped blocks are not computed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import ExitSchedule
from models.backbones.dit import DiT
from models.training.checkpoint import append_log
from models.training.data import Images, Labels
from models.training.diffusion import Batches, perturb, sample_times
from models.training.loop import Optim, Trained, train

Depths = Callable[[NDArray[np.float64]], NDArray[np.int64]]


@dataclass(frozen=True)
class ExitsRecipe:
    """`offramp train exits`, from model `base` of the output folder.

    `gears`: name -> share of blocks to run on average, 1.0 for full depth.
    `solver`, `steps`, `guidance`: every gear's defaults.
    """

    name: str
    base: str
    explore: Optim
    optim: Optim
    gears: dict[str, float]
    default: str = "balanced"
    solver: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 2.0
    shallowest: int = 3
    bins: int = 10
    full_share: float = 0.3
    label_dropout: float = 0.1
    logit_normal: float = 0.5
    bf16: bool = True
    seed: int = 1


def sorted_rows(depths: NDArray[np.int64]) -> tuple[Tensor, list[int]]:
    """Order that makes `depths` non-increasing, and the depths in that order."""
    order = np.argsort(-depths, kind="stable")
    return torch.from_numpy(order), depths[order].tolist()


def fine_tune(
    model: DiT, recipe: ExitsRecipe, optim: Optim, batches: Batches, choose: Depths, out: Path, label: str
) -> Trained:
    """Train with a depth per row chosen from its time; the time embedder stays frozen."""
    n = optim.batch

    def loss(step: int) -> Tensor:
        x0, y = batches.draw(n)
        u = sample_times(n, recipe.logit_normal)
        order, depths = sorted_rows(choose(u.double().numpy()))
        x0, y, u = x0[order], y[order], u[order]
        x, v = perturb(x0, u)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            guess, _ = model(x, model.condition(u, y), depths)
        return (guess.float() - v).square().mean()

    return train(model, optim, loss, out, label=label, freeze=[model.time1, model.time2])


@torch.no_grad()
def error_table(model: DiT, batches: Batches, depths: list[int], bins: int, rows: int = 512) -> NDArray[np.float64]:
    """Mean squared v error (len(depths), bins): the same images and noise at every depth."""
    model.eval()
    table = np.zeros((len(depths), bins))
    for b in range(bins):
        torch.manual_seed(1000 + b)
        x0, y = batches.draw(rows)
        u = (b + torch.rand(rows)) / bins
        x, v = perturb(x0, u)
        modulation = model.condition(u, y)
        for i, depth in enumerate(depths):
            table[i, b] = (model(x, modulation, [depth] * rows)[0] - v).square().mean().item()
    return table


def allocate(errors: NDArray[np.float64], depths: list[int], mean_depth: float) -> list[int]:
    """Depth per bin, mean at most `mean_depth`: lower, again and again, the bin where a block less costs least.

    Args:
        errors: (len(depths), bins) as `error_table` gives; `depths` rises by one per row.
        mean_depth: blocks to run on average over uniform times.
    """
    bins = errors.shape[1]
    level = [len(depths) - 1] * bins
    while sum(depths[i] for i in level) > mean_depth * bins + 1e-9:
        costs = [errors[level[b] - 1, b] - errors[level[b], b] if level[b] else np.inf for b in range(bins)]
        cheapest = int(np.argmin(costs))
        if not np.isfinite(costs[cheapest]):
            raise ValueError(f"mean depth {mean_depth} is below the shallowest exit {depths[0]}")
        level[cheapest] -= 1
    return [depths[i] for i in level]


def to_schedule(per_bin: list[int]) -> ExitSchedule:
    """Equal bins of u, neighbours of equal depth joined."""
    bins = len(per_bin)
    edges = [(b + 1) / bins for b in range(bins) if b + 1 == bins or per_bin[b + 1] != per_bin[b]]
    depths = [per_bin[b] for b in range(bins) if b + 1 == bins or per_bin[b + 1] != per_bin[b]]
    return ExitSchedule(tuple(edges), tuple(depths))


def train_exits(
    model: DiT, recipe: ExitsRecipe, images: Images, labels: Labels, out: Path
) -> tuple[DiT, dict[str, ExitSchedule], dict[str, Any]]:
    """Explore, allocate, fine-tune. Returns the averaged network, a schedule per gear, the summary."""
    torch.manual_seed(recipe.seed)
    batches = Batches(images, labels, model.null_label, recipe.label_dropout)
    depths = list(range(recipe.shallowest, model.depth + 1))

    def anywhere(u: NDArray[np.float64]) -> NDArray[np.int64]:
        return torch.randint(recipe.shallowest, model.depth + 1, (len(u),)).numpy()

    explored = fine_tune(model, recipe, recipe.explore, batches, anywhere, out / "explore", "explore")
    assert isinstance(explored.ema, DiT)
    errors = error_table(explored.ema, batches, depths, recipe.bins)
    per_bin = {
        name: [model.depth] * recipe.bins if share >= 1 else allocate(errors, depths, share * model.depth)
        for name, share in recipe.gears.items()
    }
    append_log(out, errors=errors.tolist(), depths=depths, gears=per_bin)
    table = np.array(list(per_bin.values()))
    lighter = [i for i, share in enumerate(recipe.gears.values()) if share < 1]

    def by_gear(u: NDArray[np.float64]) -> NDArray[np.int64]:
        gear = np.array(lighter)[torch.randint(len(lighter), (len(u),)).numpy()]
        bins = np.minimum((u * recipe.bins).astype(int), recipe.bins - 1)
        return np.where(torch.rand(len(u)).numpy() < recipe.full_share, model.depth, table[gear, bins])

    student = explored.ema.requires_grad_(True)
    tuned = fine_tune(student, recipe, recipe.optim, batches, by_gear, out / "gears", "gears")
    assert isinstance(tuned.ema, DiT)
    summary = {
        "loss": tuned.loss,
        "seconds": explored.seconds + tuned.seconds,
        "steps": recipe.explore.steps + recipe.optim.steps,
        "schedules": per_bin,
    }
    return tuned.ema, {name: to_schedule(bins) for name, bins in per_bin.items()}, summary
