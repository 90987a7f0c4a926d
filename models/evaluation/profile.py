"""`offramp profile MODEL`: what each gear costs on this machine and gives, kept in the model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from models.api import Runtime, UserError
from models.backends.precision import at_precision
from models.evaluation.device import Device, place
from models.evaluation.generate import GearScore, evaluate
from models.evaluation.report import find, gears_table, provenance, timing_table, write_card
from models.evaluation.timing import Ratio, time_gears, time_network
from models.store import read_json, write_json
from models.tasks.gears import write_gears
from models.tasks.generator import load, load_model
from models.training.data import splits

app = typer.Typer(help="Measure a generator's gears on this machine; writes gears.json, the card and profile.png.")
ROWS = {"cpu": (1, 2, 4, 8, 16, 32, 64, 128), "cuda": (1, 4, 16, 32, 64, 128, 256, 512, 1024)}
PICTURE = "profile.png"


def pareto(scores: Sequence[GearScore], keep: Sequence[str]) -> list[GearScore]:
    """Scores that no other beats in both layer evaluations and Frechet distance; gears in `keep` always stay."""

    def beaten(s: GearScore) -> bool:
        cost, distance = s.layer_evals_ratio, s.frechet
        return any(
            o.layer_evals_ratio <= cost
            and o.frechet <= distance
            and (o.layer_evals_ratio, o.frechet) != (cost, distance)
            for o in scores
        )

    return [s for s in scores if s.gear.name in keep or not beaten(s)]


def entry(
    stored: Mapping[str, Any], score: GearScore, time: Ratio, batch: int, floor: float, device: str = "cpu"
) -> dict[str, Any]:
    """A gear of gears.json with its measured cost and quality."""
    spread = [round(time.low, 3), round(time.high, 3)]
    return {
        **stored,
        "layer_evals_ratio": round(score.layer_evals_ratio, 4),
        "time_ratio": {"value": round(time.value, 3), "spread": spread, "device": device, "batch": batch, "threads": 1},
        "class_accuracy": round(score.class_accuracy, 4),
        "frechet": {
            "value": round(score.frechet, 4),
            "interval": [round(score.frechet_low, 4), round(score.frechet_high, 4)],
            "floor": round(floor, 4),
        },
    }


def picture(path: Path, scores: Sequence[GearScore], times: Mapping[str, Ratio], floor: float, name: str) -> None:
    """The cost/quality curve: layer evaluations against Frechet distance, with bootstrap intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(scores, key=lambda s: s.layer_evals_ratio)
    cost, value = [100 * s.layer_evals_ratio for s in ordered], [s.frechet for s in ordered]
    below = [s.frechet - s.frechet_low for s in ordered]
    above = [s.frechet_high - s.frechet for s in ordered]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.errorbar(
        cost, value, yerr=[below, above], marker="o", capsize=4, color="#20639b", label="gears, 95 % interval"
    )
    axes.axhline(floor, linestyle="--", color="#888888", label="real training images")
    for s, x, y in zip(ordered, cost, value, strict=True):
        axes.annotate(
            f"{s.gear.name} ({1 / times[s.gear.name].value:.2f}x)", (x, y), (6, 6), textcoords="offset points"
        )
    axes.set(xlabel="layer evaluations, % of full", ylabel="Frechet distance", title=name, ylim=(0, None))
    axes.set_xlim(min(cost) - 5, max(cost) + 12)
    axes.legend(loc=(0.03, 0.15), frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def write(
    folder: Path,
    stored: dict[str, Any],
    kept: Sequence[GearScore],
    times: Mapping[str, Ratio],
    batch: int,
    floor: float,
    where: Mapping[str, Any],
    device: str = "cpu",
) -> None:
    """gears.json with the gears of `kept`, in the order that they had."""
    entries = {gear["name"]: gear for gear in stored["gears"]}
    gears = [entry(entries[s.gear.name], s, times[s.gear.name], batch, floor, device) for s in kept]
    measured = [gear | dict(where) for gear in gears]
    write_gears(folder, measured, stored["default"])


def promise(folder: Path, precision: str) -> None:
    """Write into config.json what the numbers of gears.json were measured in; nothing stands for fp32."""
    config = read_json(folder / "config.json")
    config.pop("precision", None)
    write_json(folder / "config.json", config | ({} if precision == "fp32" else {"precision": precision}))


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="Model folder, or the name of a model of the zoo.")],
    data: Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")],
    judge: Annotated[Path, typer.Option(help="Ensemble that classifies the samples.")] = Path("fashion-ensemble"),
    n: Annotated[int, typer.Option(min=100, help="Label-balanced images per gear.")] = 5000,
    seed: Annotated[int, typer.Option(help="Image i of every gear uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images of the job that gears are timed with.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of every timing.")] = 7,
    workers: Annotated[int | None, typer.Option(min=1, help="Engines that sample at a time; one per core.")] = None,
    device: Device = "cpu",
    bf16: Annotated[
        bool, typer.Option(help="Run the network in bfloat16, and promise that its numbers hold in it.")
    ] = False,
) -> None:
    """Measure time against batch and depth, and cost and quality of every gear; keep the Pareto set."""
    folder = find(model)
    if find_spec("matplotlib") is None:
        raise UserError("offramp profile draws with matplotlib: pip install 'offramp[train]'")
    images, on = splits(data), place(device)
    runtime = Runtime(precision="bf16" if bf16 else "fp32")
    network = at_precision(load_model(folder)[0].to(on), runtime.precision)
    depths = sorted({depth for gear in load(folder, 1, "cpu").info.gears for depth in gear.schedule.depths})
    timing = time_network(network, ROWS[on.type], depths, repeats)
    times = time_gears(load(folder, batch, device, runtime), repeats)
    result = evaluate(folder, find(judge), images, n, seed, bf16=bf16, workers=workers, device=device)
    stored = read_json(folder / "gears.json")
    kept = pareto(result["gears"], ("full", stored["default"]))
    where = provenance(threads=1, device=on.type)
    about: dict[str, Any] = {"n": n, "seed": seed, **({"dtype": "bfloat16"} if bf16 else {}), **where}
    write(folder, stored, kept, times, batch, result["floor"], about, on.type)
    promise(folder, runtime.precision)
    picture(folder / PICTURE, kept, times, result["floor"], folder.name)
    table = gears_table({**result, "gears": kept}, n, seed, where, times, batch)
    write_card(folder, f"![cost and quality]({PICTURE})\n\n{table}\n\n{timing_table(timing)}", "offramp profile")
    print(f"{table}\n\n{timing_table(timing)}")
    dropped = [s.gear.name for s in result["gears"] if s not in kept]
    summary = {
        s.gear.name: {k: v for k, v in vars(s).items() if k != "gear"} | {"time_ratio": vars(times[s.gear.name])}
        for s in kept
    }
    done = {"model": folder.name, "gears": summary, "dropped": dropped, "floor": result["floor"]}
    print(json.dumps({**done, "network": vars(timing), "n": n, "seed": seed, **where}))
