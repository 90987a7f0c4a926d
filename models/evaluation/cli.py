"""`offramp eval ...`: the tables of the cards, from the weights as shipped."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from models.evaluation import classify as classifiers
from models.evaluation import generate as generators
from models.evaluation.report import classify_table, gears_table, write_card
from models.store import ZOO, read_config, read_json, write_json
from models.tasks.classifier import bridge_folder
from models.tasks.gears import write_gears
from models.training.data import read, splits

app = typer.Typer(no_args_is_help=True, help="Measure shipped or trained models.")
Model = Annotated[Path, typer.Argument(help="Model folder, or the name of a model of the zoo.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")]
Write = Annotated[bool, typer.Option(help="Also write the numbers into the model's card (and gears.json).")]


def find(model: Path) -> Path:
    """A folder as given, or a zoo model by name."""
    return model if (model / "config.json").is_file() else ZOO / model


def provenance() -> dict[str, str]:
    """Date, machine and commit of a measurement."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ZOO, capture_output=True, text=True, check=False)
    commit = run.stdout.strip() or "unknown"
    machine = f"{os.cpu_count()} cores {platform.machine()}, {torch.get_num_threads()} torch threads"
    return {"date": date.today().isoformat(), "machine": machine, "commit": commit}


@app.command()
def generate(
    model: Model,
    data: Data,
    judge: Annotated[Path, typer.Option(help="Ensemble that classifies the samples.")] = Path("fashion-ensemble"),
    n: Annotated[int, typer.Option(min=100, help="Label-balanced images per gear.")] = 5000,
    seed: Annotated[int, typer.Option(help="Image i of every gear uses seed + i.")] = 0,
    write: Write = False,
) -> None:
    """Cost, time, class agreement and Frechet distance of every gear."""
    folder, batch = find(model), 32
    result = generators.evaluate(folder, find(judge), splits(data), n, seed, batch)
    where = provenance()
    table = gears_table(result, n, seed, batch, where)
    print(table)
    if write:
        stored = read_json(folder / "gears.json")
        measured = {s.gear.name: s for s in result["gears"]}
        entries: list[dict[str, Any]] = []
        for entry in stored["gears"]:
            s = measured[entry["name"]]
            entries.append(
                entry
                | {
                    "layer_evals_ratio": round(s.layer_evals_ratio, 4),
                    "time_ratio": {"value": round(s.time_ratio, 3), "device": "cpu", "batch": batch},
                    "class_accuracy": round(s.class_accuracy, 4),
                    "frechet": {
                        "value": round(s.frechet, 4),
                        "interval": [round(s.frechet_low, 4), round(s.frechet_high, 4)],
                        "floor": round(result["floor"], 4),
                    },
                    "n": n,
                    "seed": seed,
                    **where,
                }
            )
        write_gears(folder, entries, stored["default"])
        write_card(folder, table)
    summary = {s.gear.name: {k: v for k, v in vars(s).items() if k != "gear"} for s in result["gears"]}
    print(json.dumps({"model": folder.name, "gears": summary, "floor": result["floor"], **where}))


@app.command()
def classify(
    model: Model,
    data: Data,
    ood: Annotated[Path | None, typer.Option(help="Folder of out-of-distribution images of the same shape.")] = None,
    write: Write = False,
) -> None:
    """Accuracy, likelihood, calibration, DEE, cost, time and out-of-distribution detection of every method."""
    folder = find(model)
    outside = read(ood, "test") if ood else None
    result = classifiers.evaluate(folder, splits(data))
    times = classifiers.time_methods(folder)
    costs = classifiers.costs_by_row(folder)
    detection = classifiers.detect(folder, splits(data).test, outside) if outside else {}
    where = provenance()
    table = classify_table(result, costs, times, detection, where)
    print(table)
    if write:
        served = {"single": "source", "ensemble": f"DE-{len(read_config(folder)['members'])}"}
        config = read_config(folder)
        beside = bridge_folder(folder)
        if beside is not None:
            served["bridge"] = f"bridge x{read_config(beside)['evaluations']}"
            write_card(beside, table)
        config["times"] = {method: round(times[name], 2) for method, name in served.items()}
        write_json(folder / "config.json", config)
        write_card(folder, table)
    summary = {k: result[k] for k in ("dee", "recovered", "curve")}
    print(json.dumps({"model": folder.name, **summary, "times": times, "auroc": detection, **where}))
