"""gears.json, version 1: named points on a generator's cost/quality curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.api import Gear, ModelInfo, SolverOptions
from models.exits.plan import make
from models.store import StoreError, read_config, read_json, weights_digest, write_json


def read_gears(folder: Path, depth: int | None = None) -> tuple[tuple[Gear, ...], str]:
    """The gears of a model folder and the default's name.

    `depth` is that of the network; without it only schedules written as tables can be read.
    """
    path = folder / "gears.json"
    data = read_json(path)
    if data.get("version") != 1:
        raise StoreError(f"{path}: version {data.get('version')!r} is not supported; supported: 1")
    gears = tuple(_gear(entry, depth, path) for entry in data["gears"])
    names = [gear.name for gear in gears]
    if data["default"] not in names or "full" not in names:
        raise StoreError(f"{path}: needs a gear named full, and a default among {names}")
    return gears, data["default"]


def described(folder: Path) -> ModelInfo:
    """A generator's folder without its network: what is needed to plan and price its work."""
    config = read_config(folder, "generator")
    depth = config.get("network", {}).get("depth")
    gears, default = read_gears(folder, depth)
    return ModelInfo(
        name=str(config["name"]),
        task="generate",
        labels=tuple(config["labels"]),
        image=(0, 0, 0),
        weights=weights_digest(config["files"]),
        depth=depth or max(max(gear.schedule.depths) for gear in gears),
        gears=gears,
        default_gear=default,
    )


def _gear(entry: dict[str, Any], depth: int | None, path: Path) -> Gear:
    try:
        return Gear(
            name=entry["name"],
            schedule=make(entry["schedule"], depth),
            solver=entry["solver"],
            steps=_steps(entry["steps"]),
            guidance=entry["guidance"],
            solver_options=SolverOptions(**entry.get("solver_options", {})),
            guidance_interval=tuple(entry.get("guidance_interval", (0.0, 1.0))),
            layer_evals_ratio=entry.get("layer_evals_ratio"),
            time_ratio=entry.get("time_ratio", {}).get("value"),
            class_accuracy=entry.get("class_accuracy"),
            frechet=entry.get("frechet", {}).get("value"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: gear {entry.get('name')!r}: {error!r}") from None


def _steps(steps: int) -> int:
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps must be from 1 to 1000, got {steps}")
    return steps


def write_gears(folder: Path, gears: list[dict[str, Any]], default: str) -> None:
    """Write gears.json; entries as `read_gears` reads them, with provenance."""
    write_json(folder / "gears.json", {"version": 1, "default": default, "gears": gears})
