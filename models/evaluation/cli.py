"""`offramp eval ...`: the tables of the cards, from the weights as shipped."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from models.evaluation import classify as classifiers
from models.evaluation import early_exit_study, studies
from models.evaluation import generate as generators
from models.evaluation import robustness as attacked
from models.evaluation.carried import load_carried
from models.evaluation.classify_report import CHEAP, classify_table
from models.evaluation.costs import Counter, cost_of_cascade, costs_of, macs_on
from models.evaluation.device import Device, place
from models.evaluation.distances import distances
from models.evaluation.leaving import cost_of_exits
from models.evaluation.report import find, gears_table, provenance, write_card
from models.evaluation.served import likeliest
from models.evaluation.served_times import BATCHES, ratios, time_served, times_table
from models.evaluation.short import short_table
from models.evaluation.uncertainty import Study, study
from models.evaluation.uncertainty_report import decisions, draw, report, scores
from models.store import read_config, write_json
from models.tasks.beside import folder_beside
from models.tasks.classifier import Classifier, load_classifier
from models.tasks.contracts import write_calibration
from models.training.data import Split, read, splits

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
    device: Device = "cpu",
) -> None:
    """Cost, class agreement and Frechet distance of every gear; `offramp profile` also times and keeps them."""
    folder, on = find(model), place(device).type
    parts = splits(data)
    result = generators.evaluate(folder, find(judge), parts, n, seed, bf16=bf16, workers=workers, device=device)
    where = provenance(device=on)
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
    device: Device = "cpu",
) -> None:
    """Accuracy, likelihood, DEE, cost and time of every method, and what its uncertainty is worth.

    `--write` also fits decisions, prediction sets and the cascade on validation, and keeps them with the model, the
    default method too: the likeliest on the selection half of validation of those that cost there less than 1.5
    times the source's MACs and time.
    """
    folder, on = find(model), place(device)
    classifier, carried = load_classifier(folder), load_carried(folder)
    move(classifier, on)
    carried.to(on)
    parts, foreign = splits(data), read(ood, "test") if ood else None
    found = study(classifier, parts, foreign, risk)
    made = classifiers.evaluate(folder, parts, foreign, found, carried, on)
    counter = Counter(classifier.members, carried, tuple(classifier.config["image"]))
    costs = costs_of(counter)
    if (cascade := cost_of_cascade(counter, classifier, found)) is not None:
        costs["cascade"] = cascade
    if classifier.exits is not None:
        costs["exits"] = cost_of_exits(counter, classifier.exits, found.test.left)
    where, engine = provenance(device=on.type), "one torch thread" if on.type == "cpu" else on.type
    served = time_served(folder, found.calibration, parts.test.images, device=on.type)
    macs = macs_on(classifier, found.calibration, found.test)
    table = f"{classify_table(made, costs, where)}\n\n{times_table(served, engine)}"
    short, more = short_table(found, macs, served, where, engine), report(found, classifier)
    print(short, table, more, sep="\n\n")
    for path in draw(found, plots) if plots else []:
        print(f"wrote {path}")
    if write:
        write_calibration(folder, classifier, found.calibration)
        default = default_on_selection(folder, classifier, found, parts.selection, on.type)
        kept = {"times": ratios(served), "default_method": default}
        write_json(folder / "config.json", read_config(folder) | kept)
        write_card(folder, f"{short}\n\n### Every seed\n\n{table}\n\n{more}")
        for kind in ("bridge", "student", "exits"):
            if (beside := folder_beside(folder, kind)) is not None:
                write_card(beside, table)
        if (beside := folder_beside(folder, "distance")) is not None:
            write_card(beside, f"{decisions(found)}\n\n{scores(found)}")
    summary = {name: vars(cost) for name, cost in costs.items()}
    print(json.dumps({"model": folder.name, **made.json(), "costs": summary, **where}))


def move(classifier: Classifier, device: torch.device) -> None:
    """Put every network of a classifier on a device."""
    networks: list[torch.nn.Module] = [*classifier.members]
    for bridge in classifier.bridges.values():
        networks += bridge.networks.values()
    if classifier.student:
        networks.append(classifier.student.network)
    if classifier.distance:
        networks.append(classifier.distance.network)
    if classifier.exits:
        networks += classifier.exits.networks
    for network in networks:
        network.to(device)


def default_on_selection(
    folder: Path, classifier: Classifier, found: Study, selection: Split, device: str = "cpu"
) -> str:
    """The likeliest method below `CHEAP`; likelihood, MACs and time (the median of three goes), all of the selection
    half."""
    macs = macs_on(classifier, found.calibration, found.selection)
    images = selection.images
    goes = [ratios(time_served(folder, found.calibration, images, ["eager"], [BATCHES[0]], device)) for _ in "123"]
    took = {name: median(go[name] for go in goes) for name in goes[0]}
    chosen = likeliest(found.selection, {name: max(macs[name], took[name]) for name in took}, CHEAP)
    print(f"default: {chosen}; time on selection images: {took}")
    return chosen


app.command()(studies.schedules)
app.command()(studies.adaptive)
app.command("dynamic")(studies.dynamic_exits)
app.command()(attacked.robustness)
app.command("exits")(early_exit_study.exits)
app.command()(distances)
