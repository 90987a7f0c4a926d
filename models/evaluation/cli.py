"""`offramp eval ...`: the tables of the cards, from the weights as shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from models.evaluation import classify as classifiers
from models.evaluation import early_exit_study, studies
from models.evaluation import generate as generators
from models.evaluation.report import classify_table, find, gears_table, provenance, write_card
from models.evaluation.uncertainty import rankings, study
from models.evaluation.uncertainty_report import draw, report
from models.store import read_config, write_json
from models.tasks.classifier import bridge_folder, load_classifier
from models.tasks.contracts import write_calibration
from models.training.data import read, splits

app = typer.Typer(no_args_is_help=True, help="Measure shipped or trained models.")
Model = Annotated[Path, typer.Argument(help="Model folder, or the name of a model of the zoo.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")]
Write = Annotated[bool, typer.Option(help="Also write the numbers into the model's card.")]


@app.command()
def generate(
    model: Model,
    data: Data,
    judge: Annotated[Path, typer.Option(help="Ensemble that classifies the samples.")] = Path("fashion-ensemble"),
    n: Annotated[int, typer.Option(min=100, help="Label-balanced images per gear.")] = 5000,
    seed: Annotated[int, typer.Option(help="Image i of every gear uses seed + i.")] = 0,
    bf16: Annotated[bool, typer.Option(help="Sample with bfloat16 networks, to screen.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Engines that sample at a time; one per core.")] = None,
) -> None:
    """Cost, class agreement and Frechet distance of every gear; `offramp profile` also times and keeps them."""
    folder = find(model)
    result = generators.evaluate(folder, find(judge), splits(data), n, seed, bf16=bf16, workers=workers)
    where = provenance()
    print(gears_table(result, n, seed, where))
    summary = {s.gear.name: {k: v for k, v in vars(s).items() if k != "gear"} for s in result["gears"]}
    print(json.dumps({"model": folder.name, "gears": summary, "floor": result["floor"], "bf16": bf16, **where}))


@app.command()
def classify(
    model: Model,
    data: Data,
    ood: Annotated[Path | None, typer.Option(help="Folder of out-of-distribution images of the same shape.")] = None,
    write: Write = False,
    plots: Annotated[Path | None, typer.Option(help="Folder for reliability.png and risk-coverage.png.")] = None,
    risk: Annotated[float, typer.Option(min=0.0001, max=0.9, help="Error rate of accepted images, at most.")] = 0.05,
) -> None:
    """Accuracy, likelihood, DEE, cost and time of every method, and what its uncertainty is worth.

    `--write` also fits decisions, prediction sets and the cascade on validation, and keeps them with the model.
    """
    folder = find(model)
    classifier = load_classifier(folder)
    found = study(classifier, splits(data), read(ood, "test") if ood else None, risk)
    result = classifiers.evaluate(folder, splits(data))
    times = classifiers.time_methods(folder)
    costs = classifiers.costs_by_row(folder)
    ranked = {method: rankings(found, method)["entropy"] for method in found.methods}
    detection = {method: r.foreign for method, r in ranked.items()} if ood else {}
    where = provenance()
    table = classify_table(result, costs, times, detection, where)
    more = report(found, classifier)
    print(table, more, sep="\n\n")
    for path in draw(found, plots) if plots else []:
        print(f"wrote {path}")
    if write:
        served = {"single": "source", "ensemble": f"DE-{len(read_config(folder)['members'])}"}
        config = read_config(folder)
        beside = bridge_folder(folder)
        if beside is not None:
            served["bridge"] = f"bridge x{read_config(beside)['evaluations']}"
            write_card(beside, table)
        write_calibration(folder, classifier, found.calibration)
        config["times"] = {method: round(times[name], 2) for method, name in served.items()}
        write_json(folder / "config.json", config)
        write_card(folder, f"{table}\n\n{more}")
    summary = {k: result[k] for k in ("dee", "recovered", "curve")}
    print(json.dumps({"model": folder.name, **summary, "times": times, "auroc": detection, **where}))


app.command()(studies.schedules)
app.command()(studies.adaptive)
app.command("dynamic")(studies.dynamic_exits)
app.command("exits")(early_exit_study.exits)
