"""Markdown tables of evaluations, and where they go in a card."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from models.evaluation.timing import Ratio, Timing
from models.store import ZOO, StoreError

NUMBERS = re.compile(r"<!-- numbers: written by `[^`\n]*` -->.*?<!-- end of numbers -->", re.DOTALL)


def find(model: Path) -> Path:
    """A folder as given, or a zoo model by name."""
    return model if (model / "config.json").is_file() else ZOO / model


def provenance(threads: int | None = None, device: str = "cpu") -> dict[str, str]:
    """Date, machine and commit of a measurement; `threads` of torch, those set now if None. `device`: its type."""
    count = torch.get_num_threads() if threads is None else threads
    machine = f"{os.cpu_count()} cores {platform.machine()}, {count} torch thread{'s' if count > 1 else ''}"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return {"date": date.today().isoformat(), "machine": machine, "commit": commit()}


def commit() -> str:
    """The commit that runs, marked where files differ from it; outside a repository GIT_COMMIT, or unknown."""
    known = os.environ.get("GIT_COMMIT", "unknown")
    if shutil.which("git") is None:
        return known
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ZOO, capture_output=True, text=True, check=False)
    diff = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ZOO, capture_output=True, check=False)
    return (run.stdout.strip() or known) + ("-dirty" if diff.returncode == 1 else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A pipe table; numbers are strings already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(where: dict[str, str]) -> str:
    """The line that says where numbers come from."""
    return f"Measured {where['date']} on {where['machine']}, commit {where['commit']}."


def gears_table(
    result: dict[str, Any],
    n: int,
    seed: int,
    where: dict[str, str],
    times: Mapping[str, Ratio] | None = None,
    batch: int = 0,
) -> str:
    """One row per gear; throughput where `times` were measured, with jobs of `batch` images."""
    first = result["gears"][0].gear
    low, high = result["floor_interval"]
    rows = [
        [
            s.gear.name,
            f"{s.layer_evals_per_image:.0f}",
            f"{1 - s.layer_evals_ratio:.1%}",
            *([f"{1 / times[s.gear.name].value:.2f}x"] if times else []),
            f"{s.class_accuracy:.1%}",
            f"{s.frechet:.3f} [{s.frechet_low:.3f}, {s.frechet_high:.3f}]",
        ]
        for s in result["gears"]
    ]
    blank = [""] * (4 if times else 3)
    rows.append(["real training images", *blank, f"{result['floor']:.3f} [{low:.3f}, {high:.3f}] (floor)"])
    timed = [f"throughput, batch {batch}"] if times else []
    header = ["gear", "layer evals / image", "saved", *timed, "classified as label", "Frechet distance [95 %]"]
    how = (
        f"{n} label-balanced images per gear, seed {seed}; {first.solver}, {first.steps} steps, guidance "
        f"{first.guidance:g}, the same noise for every gear."
    )
    return f"{markdown(header, rows)}\n\n{how} {origin(where)}"


def timing_table(timing: Timing) -> str:
    """Milliseconds of one network call against rows and depth."""
    on = "one torch thread" if timing.device == "cpu" else timing.device
    header = ["network rows", *(f"{depth} blocks" for depth in timing.depths)]
    rows = [
        [str(n), *(f"{value:.1f}" for value in values)]
        for n, values in zip(timing.rows, timing.milliseconds, strict=True)
    ]
    return (
        f"{markdown(header, rows)}\n\nMilliseconds of one network call, median of turns, {on}; a guided "
        f"image is two rows. A call on n rows takes about as long as one on max({timing.saturation:.1f}, n)."
    )


def write_card(folder: Path, table: str, command: str = "offramp eval --write") -> None:
    """Put a table between the markers of card.md, in the name of the command that made it."""
    path = folder / "card.md"
    begin, end = f"<!-- numbers: written by `{command}` -->", "<!-- end of numbers -->"
    text = path.read_text() if path.is_file() else f"# {folder.name}\n\n{begin}\n{end}\n"
    if NUMBERS.search(text) is None:
        raise StoreError(f"{path} lacks the lines {begin!r} and {end!r} that the numbers go between")
    path.write_text(NUMBERS.sub(lambda _: f"{begin}\n\n{table}\n\n{end}", text))
