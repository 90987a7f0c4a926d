"""gears.json, version 1: named points on a generator's cost/quality curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.api import ExitSchedule, Gear
from models.store import StoreError, read_json, write_json


def read_gears(folder: Path) -> tuple[tuple[Gear, ...], str]:
    """The gears of a model folder and the default's name."""
    path = folder / "gears.json"
    data = read_json(path)
    if data.get("version") != 1:
        raise StoreError(f"{path}: version {data.get('version')!r} is not supported; supported: 1")
    gears = tuple(_gear(entry, path) for entry in data["gears"])
    names = [gear.name for gear in gears]
    if data["default"] not in names or "full" not in names:
        raise StoreError(f"{path}: needs a gear named full, and a default among {names}")
    return gears, data["default"]


def _gear(entry: dict[str, Any], path: Path) -> Gear:
    try:
        schedule = entry["schedule"]
        return Gear(
            name=entry["name"],
            schedule=ExitSchedule(tuple(schedule["edges"]), tuple(schedule["depths"]), schedule.get("weights", "")),
            solver=entry["solver"],
            steps=entry["steps"],
            guidance=entry["guidance"],
            layer_evals_ratio=entry.get("layer_evals_ratio"),
            time_ratio=entry.get("time_ratio", {}).get("value"),
            class_accuracy=entry.get("class_accuracy"),
            frechet=entry.get("frechet", {}).get("value"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: gear {entry.get('name')!r}: {error!r}") from None


def write_gears(folder: Path, gears: list[dict[str, Any]], default: str) -> None:
    """Write gears.json; entries as `read_gears` reads them, with provenance."""
    write_json(folder / "gears.json", {"version": 1, "default": default, "gears": gears})
