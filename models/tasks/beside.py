"""Folders that stand beside an ensemble: finding them, and refusing what was not made for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.backbones.resnet import ResNetConfig
from models.store import StoreError, model_folders, read_config, read_json, read_tensors

TAP = "first"
Network = TypeVar("Network", bound=nn.Module)


def finite(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, refused when one holds NaN or infinity."""
    for name, values in tensors.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise StoreError(f"{path}: {name} holds NaN or infinity; train or export the model again")
    return tensors


def filled(
    network: Network, folder: Path, config: Mapping[str, Any], name: str, by: str = "`network` of config.json"
) -> Network:
    """The network with the tensors of file `name`, eval mode, frozen; `by` says what gave it its shape.

    Raises:
        StoreError: names the file, and the first tensor that is missing, too much, of another shape, or not finite.
    """
    if name not in config["files"]:
        raise StoreError(f"{folder}/config.json: files has no {name}: train or export the model again")
    path, tensors = folder / name, read_tensors(folder, name, config["files"])
    found, wanted = ({k: tuple(v.shape) for k, v in t.items()} for t in (tensors, network.state_dict()))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise StoreError(
                f"{path} does not fit {by}: {key} is {found.get(key, 'missing')}, expected {wanted.get(key, 'none')}; "
                "train or export the model again"
            )
    network.load_state_dict(finite(path, tensors))
    return network.eval().requires_grad_(False)


def number(where: str, entry: Mapping[str, Any], key: str, above: float = 0.0, below: float = math.inf) -> float:
    """Value `key` of an entry of a config.json, a finite number between two others; StoreError naming it."""
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not math.isfinite(value) or not above < value < below:
        limits = [f"above {above:g}"] * math.isfinite(above) + [f"below {below:g}"] * math.isfinite(below)
        raise StoreError(f"{where}{key} must be a finite number {' and '.join(limits)}, got {value!r}: train it again")
    return float(value)


def folder_beside(ensemble: Path, kind: str) -> Path | None:
    """The folder of this kind beside `ensemble` that was trained for it; None when there is none."""
    name = read_config(ensemble, "ensemble")["name"]
    for folder in model_folders(ensemble.parent):
        found = read_json(folder / "config.json")
        if not isinstance(found, dict) or found.get("kind") != kind:
            continue
        if read_config(folder).get("ensemble") == name:
            return folder
    return None


def check_source(folder: Path, source: dict[str, Any], ensemble: dict[str, Any], command: str = "bridge") -> None:
    """Refuse what was trained on other weights, on other preprocessing where it says its own, or on another tap.

    `command` of `offramp train` makes such a folder.
    """
    same = ensemble["files"].get(source["file"]) == source["sha256"] and ensemble["members"][0] == source["file"]
    trained, now = (ResNetConfig(**config["network"]) for config in ({**ensemble, **source}, ensemble))
    if not same or trained != now:
        raise StoreError(
            f"{folder} was trained on another {source['file']} than {ensemble['name']} has: "
            f"re-run `offramp train {command}`, or remove the {command} folder"
        )
    if source.get("tap", TAP) != TAP:
        raise StoreError(f"{folder}/config.json: source.tap is {source['tap']!r}, a source's tap here is {TAP!r}")
