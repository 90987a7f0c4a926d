"""`offramp train ...`: recipe in, model folder out, one JSON line at the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from models.api import ExitSchedule
from models.evaluation.choose import calibrate, choose_bridge
from models.solvers.process import Cosine, from_config
from models.store import read_config, weights_digest, write_json, write_model
from models.tasks.classifier import load_members
from models.tasks.gears import write_gears
from models.tasks.generator import load_model
from models.training import bridge as bridges
from models.training.data import splits
from models.training.diffusion import DiffusionRecipe, model_config, train_diffusion
from models.training.exits import ExitsRecipe, train_exits
from models.training.members import MembersRecipe, train_members
from models.training.recipe import RecipeError, read_recipe

app = typer.Typer(no_args_is_help=True, help="Train the models of the zoo, or yours, from recipes.")
Recipe = Annotated[Path, typer.Option(help="Recipe file (TOML); see models/training/recipes.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")]
Out = Annotated[Path, typer.Option(help="Folder for model folders and, under runs/, checkpoints to resume from.")]


def unmeasured(
    schedules: dict[str, ExitSchedule], weights: str, defaults: DiffusionRecipe | ExitsRecipe
) -> list[dict[str, Any]]:
    """Entries of gears.json before `offramp profile` measures them."""
    return [
        {
            "name": name,
            "schedule": {"edges": schedule.edges, "depths": schedule.depths, "weights": weights},
            "solver": defaults.solver,
            "steps": defaults.steps,
            "guidance": defaults.guidance,
        }
        for name, schedule in schedules.items()
    ]


def done(**summary: Any) -> None:
    """The closing line."""
    print(json.dumps(summary))


@app.command()
def diffusion(recipe: Recipe, data: Data, out: Out) -> None:
    """Train a diffusion transformer at full depth; it serves with the one gear `full`."""
    r = read_recipe(recipe, DiffusionRecipe)
    train = splits(data).train
    trained = train_diffusion(r, train.images, train.labels, out / "runs" / r.name)
    config = model_config(r.name, r.labels, r.network, "Full depth only; base of exit fine-tuning.")
    weights = write_model(out / r.name, config, {"model.safetensors": trained.ema.state_dict()})
    full = {"full": ExitSchedule((1.0,), (r.network.depth,))}
    write_gears(out / r.name, unmeasured(full, weights, r), "full")
    done(model=r.name, weights=weights, loss=trained.loss, seconds=trained.seconds, steps=trained.steps, seed=r.seed)


@app.command()
def exits(recipe: Recipe, data: Data, out: Out) -> None:
    """Fine-tune a diffusion transformer for several exit schedules; writes gears.json, unmeasured."""
    r = read_recipe(recipe, ExitsRecipe)
    train = splits(data).train
    model, config, _ = load_model(out / r.base)
    if from_config(config["process"]) != Cosine(clip=config["process"].get("clip")) or "codec" in config:
        raise RecipeError(f"{recipe}: base {r.base!r} is no pixel model of the cosine process that predicts v")
    model.requires_grad_(True)
    tuned, schedules, summary = train_exits(model, r, train.images, train.labels, out / "runs" / r.name)
    description = "Class-conditional pixel diffusion, early exits by diffusion time."
    fresh = {**config, "name": r.name, "description": description}
    weights = write_model(out / r.name, fresh, {"model.safetensors": tuned.state_dict()})
    write_gears(out / r.name, unmeasured(schedules, weights, r), r.default)
    done(model=r.name, weights=weights, seed=r.seed, **summary)


@app.command()
def members(recipe: Recipe, data: Data, out: Out) -> None:
    """Train the members of a deep ensemble."""
    r = read_recipe(recipe, MembersRecipe)
    split = splits(data)
    summary = train_members(r, split, out)
    config = read_config(out / r.name)
    write_json(out / r.name / "config.json", {**config, "temperatures": calibrate(out / r.name, split.selection)})
    done(**summary, seed=r.seed)


@app.command()
def bridge(recipe: Recipe, data: Data, out: Out) -> None:
    """Train bridges over several seeds, and regressors of the same size beside them; ships the best on validation."""
    r = read_recipe(recipe, bridges.BridgeRecipe)
    split = splits(data)
    folder = out / r.ensemble
    ensemble = read_config(folder, "ensemble")
    runs = out / "runs" / r.name / weights_digest(ensemble["files"])[:12]
    cache = bridges.build_cache(load_members(folder), split.train.images, r, runs / "cache.safetensors")

    def validate(models: dict[str, Any]) -> float:
        return min(choose_bridge(models, folder, split.selection).scores.values())

    network, pilot = bridges.choose_logits(r, cache, runs, validate)
    r = dataclasses.replace(r, network=network)
    trained = bridges.train_all(r, cache, runs)
    chosen = choose_bridge({k: t.ema for k, t in trained.items()}, folder, split.selection)
    source = ensemble["members"][0]
    config = {
        "kind": "bridge",
        "name": r.name,
        "backbone": "bridge",
        "ensemble": r.ensemble,
        "source": {"file": source, "sha256": ensemble["files"][source], "tap": "first"},
        "weights": weights_digest(ensemble["files"]),
        **chosen.config,
    }
    files = {f"{k}.safetensors": t.ema.state_dict() for k, t in trained.items()}
    weights = write_model(out / r.name, config, files)
    logs = {k: bridges.summary(t) for k, t in trained.items()}
    done(
        model=r.name,
        weights=weights,
        chosen=chosen.config,
        validation=chosen.scores,
        pilot=pilot,
        runs=logs,
        seed=r.seed,
    )
