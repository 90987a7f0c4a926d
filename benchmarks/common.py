"""What the benchmarks share: ratios with their spread, a table, a last line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    """Median and range over repeats."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def spread(values: Sequence[float]) -> Ratio:
    """Median and range."""
    return Ratio(float(statistics.median(values)), float(min(values)), float(max(values)))


def ratio(mine: Sequence[float], base: Sequence[float]) -> Ratio:
    """`mine` over `base`, repeat by repeat."""
    return spread([a / b for a, b in zip(mine, base, strict=True)])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns."""
    cells = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def setup(description: str | None) -> None:
    """Read --threads, one by default, and set it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    torch.set_num_threads(parser.parse_args().threads)


def finish(name: str, **found: Any) -> None:
    """The last line: JSON with the machine."""
    machine = f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}"
    print(
        json.dumps({"benchmark": name, "machine": machine, "threads": torch.get_num_threads(), **found}, default=vars)
    )
