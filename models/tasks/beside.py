"""Folders that stand beside an ensemble: finding them, and refusing what was not made for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.store import StoreError, model_folders, read_config, read_json

TAP = "first"


def finite(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, refused when one holds NaN or infinity."""
    for name, values in tensors.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise StoreError(f"{path}: {name} holds NaN or infinity; train or export the model again")
    return tensors


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
    if not same or source.get("network", ensemble["network"]) != ensemble["network"]:
        raise StoreError(
            f"{folder} was trained on another {source['file']} than {ensemble['name']} has: "
            f"re-run `offramp train {command}`, or remove the {command} folder"
        )
    if source.get("tap", TAP) != TAP:
        raise StoreError(f"{folder}/config.json: source.tap is {source['tap']!r}, a source's tap here is {TAP!r}")
