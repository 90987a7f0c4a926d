"""`offramp train ...`: recipe in, model folder out, one JSON line at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from models.api import ExitSchedule
from models.backbones.bridge import BridgeNetwork
from models.backbones.interface import Backbone
from models.backbones.resnet import ResNet
from models.evaluation.report import find, provenance
from models.solvers.process import Cosine, from_config
from models.store import SHARD, read_config, write_json, write_model
from models.tasks.classifier import load_members
from models.tasks.gears import write_gears
from models.tasks.generator import load_model
from models.training import bridge as bridges
from models.training import compare, exit_heads
from models.training.curves import midpoints
from models.training.data import Split, pack, read, splits
from models.training.diffusion import Batches, DiffusionRecipe, model_config, train_diffusion
from models.training.distance import DistanceRecipe, fit_distance, write_distance
from models.training.distill import DistillRecipe, train_students
from models.training.exits import ExitsRecipe, error_table, train_exits
from models.training.members import MembersRecipe, temperatures, train_members
from models.training.recipe import RecipeError, build, read_recipe
from models.training.serving import Validation, choose, write_bridge
from models.training.session import Paused, begin, device_of
from models.training.transfer import Transfer, cached

app = typer.Typer(no_args_is_help=True, help="Train the models of the zoo, or yours, from recipes.")
Recipe = Annotated[Path, typer.Option(help="Recipe file (TOML); see models/training/recipes.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")]
Out = Annotated[Path, typer.Option(help="Folder for model folders and, under runs/, checkpoints to resume from.")]
Device = Annotated[str, typer.Option(help="Where networks train: auto (CUDA where there is one), cpu or cuda.")]
Minutes = Annotated[
    float | None, typer.Option(min=0, help="Stop with a checkpoint after so many minutes; the same command goes on.")
]


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
    print(json.dumps({"finished": True, **summary}))


@contextmanager
def pausing(name: str) -> Iterator[None]:
    """A run that is out of time closes with `"finished": false`, and no error."""
    try:
        yield
    except Paused as pause:
        done(model=name, finished=False, run=pause.label, step=pause.step, steps=pause.steps)


def loaded(ensemble: Path, device: torch.device) -> list[ResNet]:
    """The members of an ensemble folder on a device."""
    return [member.to(device) for member in load_members(ensemble)]


def validated(model: Backbone, split: Split) -> float:
    """Mean squared v error of full depth over images that it was not trained on, times uniform."""
    batches = Batches(split.images, split.labels, model.null_label, 0.0, device=device_of(model))
    return float(error_table(model, batches, [model.depth], 10).mean())


@app.command("pack")
def pack_images(data: Data, out: Annotated[Path, typer.Option(help="Folder for the packed data.")]) -> None:
    """Write a data folder as train.safetensors and test.safetensors, which every command reads in no time."""
    parts = {part: read(data, part) for part in ("train", "test")}
    for part, split in parts.items():
        pack(split, out / f"{part}.safetensors")
    done(data=str(out), images={part: len(split) for part, split in parts.items()})


@app.command()
def diffusion(
    recipe: Recipe,
    data: Data,
    out: Out,
    device: Device = "auto",
    minutes: Minutes = None,
    pilot: Annotated[
        float | None,
        typer.Option(min=0.01, help="Train NAME-pilot in so many minutes in all, to compare recipes at equal time."),
    ] = None,
) -> None:
    """Train a diffusion transformer at full depth; it serves with the one gear `full`."""
    session, r = begin(device, minutes), read_recipe(recipe, DiffusionRecipe)
    if pilot is not None:
        r = dataclasses.replace(r, name=f"{r.name}-pilot", optim=dataclasses.replace(r.optim, minutes=pilot))
    split = splits(data)
    with pausing(r.name):
        trained = train_diffusion(r, split.train.images, split.train.labels, out / "runs" / r.name, session)
        config = model_config(r.name, r.labels, r.network, "Full depth only; base of exit fine-tuning.", r.backbone)
        files = {"model.safetensors": trained.ema.state_dict()}
        weights = write_model(out / r.name, config, files, shard=SHARD)
        full = {"full": ExitSchedule((1.0,), (r.network.depth,))}
        write_gears(out / r.name, unmeasured(full, weights, r), "full")
        assert isinstance(trained.ema, Backbone)
        logs = {"loss": trained.loss, "seconds": trained.seconds, "steps": trained.steps, "seed": r.seed}
        done(model=r.name, weights=weights, **logs, validation=validated(trained.ema, split.selection))


@app.command()
def exits(recipe: Recipe, data: Data, out: Out, device: Device = "auto", minutes: Minutes = None) -> None:
    """Fine-tune a diffusion transformer for several exit schedules; writes gears.json, unmeasured."""
    session, r = begin(device, minutes), read_recipe(recipe, ExitsRecipe)
    train = splits(data).train
    model, config, _ = load_model(out / r.base)
    if from_config(config["process"]) != Cosine(clip=config["process"].get("clip")) or "codec" in config:
        raise RecipeError(f"{recipe}: base {r.base!r} is no pixel model of the cosine process that predicts v")
    model.requires_grad_(True)
    with pausing(r.name):
        tuned, schedules, summary = train_exits(model, r, train.images, train.labels, out / "runs" / r.name, session)
        description = "Class-conditional pixel diffusion, early exits by diffusion time."
        fresh = {**config, "name": r.name, "description": description}
        weights = write_model(out / r.name, fresh, {"model.safetensors": tuned.state_dict()}, shard=SHARD)
        write_gears(out / r.name, unmeasured(schedules, weights, r), r.default)
        done(model=r.name, weights=weights, seed=r.seed, **summary)


@app.command()
def members(recipe: Recipe, data: Data, out: Out, device: Device = "auto", minutes: Minutes = None) -> None:
    """Train the members of a deep ensemble."""
    session, r = begin(device, minutes), read_recipe(recipe, MembersRecipe)
    split = splits(data)
    with pausing(r.name):
        summary = train_members(r, split, out, session)
        config, served = read_config(out / r.name), loaded(out / r.name, session.device)
        write_json(out / r.name / "config.json", {**config, "temperatures": temperatures(served, split.selection)})
        done(**summary, seed=r.seed)


@app.command()
def bridge(recipe: Recipe, data: Data, out: Out, device: Device = "auto", minutes: Minutes = None) -> None:
    """Train bridges over several seeds, and what they are compared with; serves what validation likes best."""
    session, r = begin(device, minutes), read_recipe(recipe, bridges.BridgeRecipe)
    split, folder, runs = splits(data), out / r.ensemble, out / "runs" / r.name
    ensemble, members = read_config(folder, "ensemble"), loaded(folder, session.device)
    with pausing(r.name):
        cache = cached(r.transfer, folder, generator(r.transfer, out), members, split.train.images, out)
        seen = split.train[slice(0, ensemble["trained_on"]["images"])]
        todo = bridges.runs(r, len(members))
        curved = "curve" in r.kinds
        middles = midpoints(members, seen, cache.pixels, r.curve, r.seed, runs, session) if curved else {}
        trained = bridges.train_all(r, todo, cache, middles, runs, session)
        networks = {name: t.ema for name, t in trained.items() if isinstance(t.ema, BridgeNetwork)}
        served, scores = choose(r, todo, networks, Validation(members[0], split.selection))
        weights = write_bridge(out / r.name, r, ensemble, todo, networks, served)
        logs = {name: bridges.summary(t) for name, t in trained.items()}
        entries = {method: s.entry() for method, s in served.items()}
        done(model=r.name, weights=weights, serve=entries, validation=scores, runs=logs, seed=r.seed)


@app.command()
def distill(recipe: Recipe, data: Data, out: Out, device: Device = "auto", minutes: Minutes = None) -> None:
    """Train single networks on the ensemble's answers."""
    session, r = begin(device, minutes), read_recipe(recipe, DistillRecipe)
    split, folder = splits(data), out / r.ensemble
    members = loaded(folder, session.device)
    with pausing(r.name):
        cache = cached(r.transfer, folder, generator(r.transfer, out), members, split.train.images, out)
        ensemble = read_config(folder, "ensemble")
        done(**train_students(r, cache, ensemble, split.selection, out, session), seed=r.seed)


@app.command()
def heads(recipe: Recipe, data: Data, out: Out) -> None:
    """Train exit heads on the source's stages, and choose when images leave it."""
    r = read_recipe(recipe, exit_heads.ExitHeadsRecipe)
    split, folder = splits(data), out / r.ensemble
    members = load_members(folder)
    cache = cached(r.transfer, folder, generator(r.transfer, out), members, split.train.images, out)
    validation = exit_heads.Validation(members[0], split.selection)
    made = exit_heads.train_exit_heads(r, cache, members[0], validation, out / "runs" / r.name)
    done(**exit_heads.write_heads(out / r.name, r, read_config(folder, "ensemble"), made), seed=r.seed)


@app.command()
def distance(recipe: Recipe, data: Data, out: Out) -> None:
    """Fit how far an image's features lie from those of each class, on images that the source did not see."""
    r = read_recipe(recipe, DistanceRecipe)
    folder = out / r.ensemble
    ensemble, source = read_config(folder, "ensemble"), load_members(folder)[0]
    unseen = splits(data).train[slice(ensemble["trained_on"]["images"], None)]
    network = fit_distance(r, source, unseen)
    done(model=r.name, weights=write_distance(out / r.name, r, ensemble, network, len(unseen)), images=len(unseen))


@app.command("compare")
def compare_arms(recipe: Recipe, data: Data, out: Out) -> None:
    """What a bridge should learn from, see and look like: every arm of a study, scored on validation."""
    study = read_recipe(recipe, compare.StudyRecipe)
    base = build(bridges.BridgeRecipe, study.base, str(recipe))
    folder, drawn_by = out / base.ensemble, generator(base.transfer, out)
    arms = compare.compare(study, folder, drawn_by, splits(data), out, str(recipe))
    print(compare.table(arms))
    done(study=base.name, arms={arm.name: arm.nll for arm in arms}, **provenance())


def generator(transfer: Transfer, out: Path) -> Path:
    """The folder of the generator that a transfer set draws from: trained here, else of the zoo."""
    trained = out / transfer.generator
    return trained if (trained / "config.json").is_file() else find(Path(transfer.generator))
