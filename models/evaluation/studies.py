"""`offramp eval schedules` and `offramp eval adaptive`: how exits should be chosen, by measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from models.evaluation import adaptive as oracles
from models.evaluation import dynamic
from models.evaluation import schedules as fixed
from models.evaluation.generate import Judge
from models.evaluation.report import find, markdown, provenance
from models.evaluation.trajectories import make_sampler
from models.tasks.gears import read_gears
from models.training.data import splits

Model = Annotated[Path, typer.Argument(help="Model folder, or the name of a model of the zoo.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")]
Ensemble = Annotated[Path, typer.Option(help="Ensemble that classifies the samples.")]
Shallowest = Annotated[int, typer.Option(min=1, help="Shallowest exit.")]
Half = Annotated[bool, typer.Option(help="Screen with bfloat16 networks.")]


def numbers(text: str) -> list[float]:
    """Comma-separated numbers."""
    return [float(part) for part in text.split(",") if part]


def schedules(
    model: Model,
    data: Data,
    judge: Ensemble = Path("fashion-ensemble"),
    n: Annotated[int, typer.Option(min=100, help="Label-balanced images per candidate.")] = 2000,
    rows: Annotated[int, typer.Option(min=10, help="Images per cell of the sensitivity table.")] = 50,
    drops: Annotated[str, typer.Option(help="ASE lists to compare with: blocks of 28 dropped per level.")] = "4,4.5",
    shares: Annotated[str, typer.Option(help="Further budgets, as shares of full depth.")] = "",
    shallowest: Shallowest = 3,
    bins: Annotated[int, typer.Option(min=1, help="Equal bins of diffusion time.")] = 10,
    seed: Annotated[int, typer.Option(help="Image i of every candidate uses seed + i.")] = 0,
    bf16: Half = True,
    workers: Annotated[int, typer.Option(min=1, help="Single-threaded engines at a time.")] = 1,
) -> None:
    """Compare schedules at equal budgets: ASE's list, greed, dynamic programming on two cost tables."""
    folder, found = find(model), splits(data)
    sample = fixed.Screen(rows, 1_000_000, bf16, workers)
    depths, errors, costs = fixed.calibrate(folder, found, shallowest, bins, sample)
    full = next(gear for gear in read_gears(folder, depths[-1])[0] if gear.name == "full")
    gears = fixed.candidates(full, depths, errors, costs, numbers(drops), numbers(shares))
    compared = fixed.compare(folder, Judge(find(judge), found), gears, fixed.Screen(n, seed, bf16, workers))
    header = ["schedule", "blocks by bin of u", "saved", "Frechet", "of full", "classified as label", "deviation"]
    print(markdown(header, fixed.rows(compared, bins)))
    tables = {"depths": depths, "errors": errors.tolist(), "sensitivity": costs.tolist()}
    print(json.dumps({"model": folder.name, **tables, "n": n, "rows": rows, "seed": seed, **provenance()}))


def adaptive(
    model: Model,
    n: Annotated[int, typer.Option(min=50, help="Trajectories.")] = 2000,
    taus: Annotated[str, typer.Option(help="Tolerated output errors.")] = "0.05,0.07,0.1,0.15,0.2",
    shallowest: Shallowest = 3,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
) -> None:
    """E0: the share of the oracle depth's variance that diffusion time does not explain.

    A second table weighs errors by |dx'/do|, how much of them reaches the state; its tau is the same share of mean.
    """
    folder = find(model)
    sampler = make_sampler(folder, "full", shallowest)
    found, labels = oracles.errors(sampler, n, seed)
    gains = sampler.gains()
    tables = {"output": found, "state": found * gains / gains.mean()}
    header = ["error of", "tau", "mean d*", "variance", "within time", "and label", "and last d*"]
    rows, summary = [], []
    for name, table in tables.items():
        for tau in numbers(taus):
            s = oracles.shares(table, labels, sampler.depths, tau)
            rows.append([name, *(f"{value:.3g}" for value in vars(s).values())])
            summary.append({"error": name, **vars(s)})
    print(markdown(header, rows))
    print(json.dumps({"model": folder.name, "n": n, "seed": seed, "e0": summary, **provenance()}))


def dynamic_exits(
    model: Model,
    data: Data,
    judge: Ensemble = Path("fashion-ensemble"),
    gear: Annotated[str, typer.Option(help="Gear whose schedule is made dynamic.")] = "eco",
    n: Annotated[int, typer.Option(min=50, help="Label-balanced images per policy.")] = 2000,
    rows: Annotated[int, typer.Option(min=50, help="Images that the thresholds are calibrated on.")] = 200,
    share: Annotated[str, typer.Option(help="Shares of rows moved up, and as many down.")] = "0.2,0.4",
    shallowest: Shallowest = 3,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    bf16: Half = True,
) -> None:
    """E1: fixed schedule, one-step-late convergence exit, and the same exits shuffled over rows."""
    folder, found = find(model), splits(data)
    scorer = Judge(find(judge), found)
    sampler = make_sampler(folder, gear, shallowest, bf16)
    whole = make_sampler(folder, "full", shallowest, bf16)
    never = np.full((len(sampler.trajectory.coef), len(sampler.depths)), np.inf)
    arms = {"full": dynamic.arm(whole, -never, never, n, seed), gear: dynamic.arm(sampler, -never, never, n, seed)}
    for part in numbers(share):
        low, high = dynamic.thresholds(sampler, dynamic.levels(sampler), part, rows, 1_000_000)
        arms[f"dynamic {part:.0%}"] = dynamic.arm(sampler, low, high, n, seed)
        arms[f"shuffled {part:.0%}"] = dynamic.arm(sampler, low, high, n, seed, shuffled=True)
    table, summary = [], {}
    for name, made in arms.items():
        score = scorer.score(made.images)
        apart = np.square((made.images.astype(np.float64) - arms["full"].images) / 127.5).mean((1, 2, 3))
        worst = float(np.quantile(apart, 0.99))
        values = {"blocks": made.blocks, **vars(score), "deviation": float(apart.mean()), "worst": worst}
        summary[name] = values
        shown = [made.blocks, score.frechet, 100 * score.class_accuracy, values["deviation"], worst]
        table.append([name, *(f"{value:.4g}" for value in shown)])
    print(markdown(["policy", "blocks", "Frechet", "classified as label", "deviation", "worst 1 %"], table))
    print(json.dumps({"model": folder.name, "gear": gear, "n": n, "seed": seed, "e1": summary, **provenance()}))
