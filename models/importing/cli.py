"""`offramp import`: a checkpoint from elsewhere in, a model folder out, one JSON line at the end."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from models.api import UserError
from models.importing.diffusers import read_pipeline
from models.importing.folder import Imported, write
from models.importing.originals import Told, read_dit, read_uvit

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """Where a checkpoint comes from."""

    diffusers = "diffusers"
    dit = "dit"
    uvit = "uvit"


@app.command()
def bring(
    source: Annotated[Path, typer.Argument(help="A diffusers pipeline folder, or a .pt file.")],
    form: Annotated[Format, typer.Option("--from", help="diffusers, or an original DiT or U-ViT checkpoint.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; serve it from the folder that holds it.")],
    name: Annotated[str | None, typer.Option(help="The model's name; the folder's if absent.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Steps of the gear `full`.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, max=20.0, help="Guidance of the gear `full`.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="dit, uvit: heads, for unusual widths.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="uvit: labels, where the last is no null label.")] = None,
    vae: Annotated[Path | None, typer.Option(help="dit, uvit: AutoencoderKL folder of diffusers, for latents.")] = None,
) -> None:
    """Make a model folder of a checkpoint that you already have; it serves with the one gear `full`."""
    told = Told(heads=heads, classes=classes, vae=vae)
    imported = read(source, form, told)
    changes = {key: value for key, value in (("steps", steps), ("guidance", guidance)) if value is not None}
    imported = dataclasses.replace(imported, gear={**imported.gear, **changes})
    name = name or out.resolve().name
    weights = write(imported, out, name, f"{form.value} {source.name or source.resolve().name}")
    for note in imported.notes:
        typer.echo(note, err=True)
    gear = {"gear": "full", **imported.gear}
    print(json.dumps({"model": name, "folder": str(out), "weights": weights, "network": imported.network, **gear}))


def read(source: Path, form: Format, told: Told) -> Imported:
    """The checkpoint's parts; UserError for an option that its format does not have."""
    unfit = {"diffusers": ("heads", "classes", "vae"), "dit": ("classes",), "uvit": ()}[form.value]
    for option in unfit:
        if getattr(told, option) is not None:
            raise UserError(f"--{option} is not for --from {form.value}")
    if form is Format.diffusers:
        return read_pipeline(source)
    return read_dit(source, told) if form is Format.dit else read_uvit(source, told)
