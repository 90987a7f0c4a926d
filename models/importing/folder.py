"""The model folder that an import ends in, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.api import SolverOptions, UserError
from models.backbones.interface import Backbone
from models.registry import BACKBONES, CODECS, SOLVERS, resolve
from models.solvers.process import from_config
from models.store import write_model
from models.tasks.gears import write_gears


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A generator as it was found elsewhere.

    Attributes:
        network, process: tables of config.json.
        tensors: the backbone's, in the precision of the source.
        gear: solver, steps, solver_options and guidance of the gear `full`.
        codec: name, config and tensors of the codec, None for pixel models.
        guided_channels: leading channels that guidance acts on, None for all, 0 where there is none to be had.
    """

    backbone: str
    network: dict[str, Any]
    process: dict[str, Any]
    tensors: Mapping[str, Tensor]
    labels: list[str]
    gear: dict[str, Any]
    codec: tuple[str, dict[str, Any], Mapping[str, Tensor]] | None = None
    guided_channels: int | None = None
    notes: list[str] = field(default_factory=list)


def write(imported: Imported, out: Path, name: str, source: str) -> str:
    """Write config.json, weights and gears.json; returns the weights digest.

    Raises:
        UserError: the folder is in use, or the parts do not fit each other.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder")
    depth = check(imported)
    files = {"model.safetensors": imported.tensors}
    config: dict[str, Any] = {
        "kind": "generator",
        "name": name,
        "description": " ".join([f"Imported from {source}.", *imported.notes]),
        "backbone": imported.backbone,
        "network": imported.network,
        "process": imported.process,
        "labels": imported.labels,
    }
    if imported.guided_channels is not None:
        config["guided_channels"] = imported.guided_channels
    if imported.codec is not None:
        codec, settings, files["codec.safetensors"] = imported.codec
        config["codec"] = {"name": codec, "file": "codec.safetensors", "config": settings}
    weights = write_model(out, config, files, keep_dtype=True)
    schedule = {"edges": [1.0], "depths": [depth], "weights": weights}
    write_gears(out, [{"name": "full", "schedule": schedule, **imported.gear}], "full")
    return weights


def check(imported: Imported) -> int:
    """Build everything that serving will build; returns the network's depth."""
    with torch.device("meta"):
        network: Backbone = resolve(BACKBONES, imported.backbone).from_config(imported.network)
    try:
        network.load_state_dict(imported.tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"the tensors do not fit the network that their shapes describe: {error}") from None
    gear, process = imported.gear, from_config(imported.process)
    resolve(SOLVERS, gear["solver"])(process, gear["steps"], SolverOptions(**gear["solver_options"]))
    name, settings, tensors = imported.codec or ("identity", {}, {})
    resolve(CODECS, name)(settings, tensors).image_shape(network.row_shape)
    return network.depth
