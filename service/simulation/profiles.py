"""What ticks take: points as `service.worker.warmup.tick_times` measures them, from a file or the command line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from models.api import UserError

Points = list[tuple[float, float]]
SHIPPED = Path(__file__).parent / "ticks.json"
HELP = 'rising (units, milliseconds), as in {"points": [[16, 9.1], [32, 13.3]]} or --ticks 16:9.1,32:13.3'


def read_profile(path: Path = SHIPPED) -> tuple[Points, str]:
    """The points of a profile, and what it says that they are of."""
    try:
        data = json.loads(path.read_text())
        return _checked([(float(units), float(ms)) for units, ms in data["points"]]), str(data.get("of", path.name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a profile ({error}): {HELP}") from None


def parse_ticks(text: str) -> Points:
    """Points as they are written on the command line."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return _checked([(float(units), float(ms)) for units, ms in pairs])
    except ValueError as error:
        raise UserError(f"--ticks {text!r}: {error}: {HELP}") from None


def write_profile(path: Path, points: Points, of: str) -> None:
    """A file as `read_profile` reads it."""
    path.write_text(json.dumps({"of": of, "points": [[units, round(ms, 3)] for units, ms in points]}) + "\n")


def _checked(points: Points) -> Points:
    if not points or points[0][0] <= 0 or points[0][1] <= 0:
        raise ValueError("needs at least one point, above 0")
    if any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(points)):
        raise ValueError("units must rise, and milliseconds must not fall")
    return points
