"""Fine-tune a diffusion backbone so that one set of weights serves several exit schedules.

Moon et al. (ICML 2024): rows at time u run the first S(u) blocks and the shared head; the loss is the
diffusion loss; the time embedder is frozen; the averaged weights are kept. Ours: depths drawn uniformly
first (`explore`), schedules optimised on the errors measured then, rows of all gears in every minibatch
(sorted-prefix, so dropped blocks are not computed), and, at will, the full-depth output as a second target.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import ExitSchedule, UserError
from models.backbones.interface import Backbone
from models.exits.optimise import equal_edges, optimise, to_schedule, uniform_times, visits
from models.exits.plan import make, plan
from models.store import read_json
from models.training.checkpoint import append_log
from models.training.compiling import compile_in_place
from models.training.data import Images, Labels
from models.training.diffusion import Batches, perturb, sample_times
from models.training.loop import Optim, Trained, train
from models.training.session import HERE, Session, device_of, half, to

Depths = Callable[[NDArray[np.float64]], NDArray[np.int64]]
SNR_CLIP = 5.0
SCHEDULES = "schedules.json"  # in a run's folder


@dataclass(frozen=True)
class ExitsRecipe:
    """`offramp train exits`, from model `base` of the output folder.

    `gears`: name -> share of the blocks of a trajectory (1.0 is full depth, less is optimised), or an exit of
    models.registry.EXITS with its parameters, such as {exit = "ase", name = "demo"}.
    `explore`: steps at uniform depths before errors are measured; 0 where `base` knows its exits already.
    `loss_weight`: lambda(u): "none", "snr_clip" (Hang et al., ICCV 2023, v-prediction), or one number per tenth of u.
    `distill`: share of the loss that is against the `teacher`'s full-depth output, for rows that leave early;
    the teacher is the `start` or the `ema` of this run.
    `solver`, `steps`, `guidance`: every gear's defaults. `flip`: half of the images are mirrored.
    """

    name: str
    base: str
    optim: Optim
    gears: dict[str, Any]
    explore: Optim = Optim(steps=0)
    default: str = "balanced"
    solver: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 2.0
    shallowest: int = 3
    bins: int = 10
    full_share: float = 0.3
    label_dropout: float = 0.1
    logit_normal: float = 0.5
    loss_weight: object = "none"
    distill: float = 0.0
    teacher: str = "start"
    bf16: bool = True
    seed: int = 1
    flip: bool = False


def sorted_rows(depths: NDArray[np.int64]) -> tuple[Tensor, list[int]]:
    """Order that makes `depths` non-increasing, and the depths in that order."""
    order = np.argsort(-depths, kind="stable")
    return torch.from_numpy(order), depths[order].tolist()


def loss_weights(kind: object, u: Tensor) -> Tensor:
    """lambda(u) of times (n,), with mean near 1 over uniform times."""
    if kind == "none":
        return torch.ones_like(u)
    if kind == "snr_clip":
        grid = (torch.arange(1000, device=u.device) + 0.5) / 1000
        return snr_clip(u) / snr_clip(grid).mean()
    if not isinstance(kind, Sequence) or isinstance(kind, str):
        raise UserError(f"loss_weight must be none, snr_clip or numbers per bin, got {kind!r}")
    table = torch.tensor(kind, dtype=torch.float32, device=u.device)
    return table[(u * len(table)).long().clamp(max=len(table) - 1)] / table.mean()


def snr_clip(u: Tensor) -> Tensor:
    """min(SNR, gamma) / (SNR + 1) of the cosine process: the clipped x0 weight for a v loss."""
    snr = (1 / torch.tan(0.5 * math.pi * u)).square()
    return snr.clamp(max=SNR_CLIP) / (snr + 1)


def fine_tune(
    model: Backbone,
    recipe: ExitsRecipe,
    optim: Optim,
    batches: Batches,
    choose: Depths,
    out: Path,
    session: Session = HERE,
) -> Trained:
    """Train with a depth per row chosen from its time; what `frozen_in_exits` names stays frozen.

    Times are drawn on the CPU: depths must be known there before a step begins.
    """
    if not 0 <= recipe.distill <= 1 or recipe.teacher not in ("start", "ema"):
        raise UserError("distill must be in [0, 1] and teacher either start or ema")
    n, full, device = optim.batch, model.depth, device_of(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    teacher = ema if recipe.teacher == "ema" else copy.deepcopy(ema)
    if optim.compile and recipe.distill and optim.steps:
        compile_in_place(teacher)

    def full_depth(x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return teacher(x, teacher.condition(u, y), [full] * len(x))[0].float()

    def loss(step: int) -> Tensor:
        x0, y = batches.draw(n)
        u = sample_times(n, recipe.logit_normal)
        order, depths = sorted_rows(choose(u.double().numpy()))
        order, u = to(device, order, u[order])
        x0, y = x0[order], y[order]
        x, v = perturb(x0, u)
        target = v
        with half(device, recipe.bf16):
            guess, _ = model(x, model.condition(u, y), depths)
            early = sum(d == full for d in depths)
            if recipe.distill and early < n:
                taught = torch.lerp(v[early:], full_depth(x[early:], u[early:], y[early:]), recipe.distill)
                target = torch.cat([v[:early], taught])
        per_row = (guess.float() - target).square().mean((1, 2, 3))
        return (loss_weights(recipe.loss_weight, u) * per_row).mean()

    frozen = model.frozen_in_exits()
    return train(model, optim, loss, out, label=out.name, freeze=frozen, ema=ema, session=session)


@torch.no_grad()
def error_table(
    model: Backbone, batches: Batches, depths: Sequence[int], bins: int, rows: int = 512
) -> NDArray[np.float64]:
    """Mean squared v error (len(depths), bins): the same images and noise at every depth."""
    model.eval()
    table = np.zeros((len(depths), bins))
    for b in range(bins):
        torch.manual_seed(1000 + b)
        x0, y = batches.draw(rows)
        u = (b + torch.rand(rows, device=batches.device)) / bins
        x, v = perturb(x0, u)
        modulation = model.condition(u, y)
        for i, depth in enumerate(depths):
            table[i, b] = (model(x, modulation, [depth] * rows)[0] - v).square().mean().item()
    return table


def schedules(
    recipe: ExitsRecipe, depths: Sequence[int], errors: Callable[[Sequence[int]], NDArray[np.float64]]
) -> dict[str, ExitSchedule]:
    """A schedule per gear of the recipe; `errors` measures the cost table of `depths` when a share asks for it."""
    depth = depths[-1]
    shares = [share for share in recipe.gears.values() if not isinstance(share, Mapping) and share < 1]
    costs = errors(depths) if shares else None
    evaluations = visits(uniform_times(recipe.steps), recipe.bins)
    made: dict[str, ExitSchedule] = {}
    for name, wanted in recipe.gears.items():
        if isinstance(wanted, Mapping):
            made[name] = make(wanted, depth)
        elif wanted >= 1 or costs is None:
            made[name] = make({"exit": "full"}, depth)
        else:
            budget = round(wanted * depth * recipe.steps)
            made[name] = to_schedule(optimise(costs, depths, evaluations, budget))
    return made


def kept_schedules(path: Path, depth: int, choose: Callable[[], dict[str, ExitSchedule]]) -> dict[str, ExitSchedule]:
    """What an earlier session chose; measured again on another machine, a near tie may fall the other way."""
    if path.is_file():
        return {name: make(table, depth) for name, table in read_json(path).items()}
    chosen = choose()
    tables = {name: {"exit": "table", "edges": s.edges, "depths": s.depths} for name, s in chosen.items()}
    path.write_text(json.dumps(tables))
    return chosen


def train_exits(
    model: Backbone, recipe: ExitsRecipe, images: Images, labels: Labels, out: Path, session: Session = HERE
) -> tuple[Backbone, dict[str, ExitSchedule], dict[str, Any]]:
    """Explore, optimise, fine-tune. Returns the averaged network, a schedule per gear, the summary."""
    torch.manual_seed(recipe.seed)
    device = device_of(model.to(session.device))
    batches = Batches(images, labels, model.null_label, recipe.label_dropout, flip=recipe.flip, device=device)
    depths = range(max(recipe.shallowest, model.always), model.depth + 1)

    def anywhere(u: NDArray[np.float64]) -> NDArray[np.int64]:
        return torch.randint(depths.start, depths.stop, (len(u),)).numpy()

    explored = fine_tune(model, recipe, recipe.explore, batches, anywhere, out / "explore", session)
    assert isinstance(explored.ema, Backbone)
    knowing = explored.ema

    def errors(depths: Sequence[int]) -> NDArray[np.float64]:
        table = error_table(knowing, batches, depths, recipe.bins)
        append_log(out, errors=table.tolist(), depths=list(depths))
        return table

    chosen = kept_schedules(out / SCHEDULES, model.depth, lambda: schedules(recipe, depths, errors))
    lighter = [schedule for schedule in chosen.values() if min(schedule.depths) < model.depth]

    def by_gear(u: NDArray[np.float64]) -> NDArray[np.int64]:
        gear = torch.randint(max(1, len(lighter)), (len(u),)).numpy()
        early = np.array([plan(schedule, u) for schedule in lighter or [make({"exit": "full"}, model.depth)]])
        whole = torch.rand(len(u)).numpy() < recipe.full_share
        return np.where(whole, model.depth, early[gear, np.arange(len(u))])

    knowing.requires_grad_(True)
    tuned = fine_tune(knowing, recipe, recipe.optim, batches, by_gear, out / "gears", session)
    assert isinstance(tuned.ema, Backbone)
    per_bin = {name: plan(s, [e - 0.5 / recipe.bins for e in equal_edges(recipe.bins)]) for name, s in chosen.items()}
    append_log(out, gears=per_bin)
    summary = {
        "loss": tuned.loss,
        "seconds": explored.seconds + tuned.seconds,
        "steps": explored.steps + tuned.steps,
        "schedules": per_bin,
    }
    return tuned.ema, chosen, summary
