"""The quality of what is compared, as the cards of the zoo state it: cited, not measured again."""

from __future__ import annotations

import re

from models.store import ZOO, read_json

METHODS = ("ensemble", "bridge", "cascade")


def methods() -> dict[str, tuple[str, str, str]]:
    """Accuracy, calibrated NLL and ECE of classify methods, from the card of fashion-ensemble."""
    card, found = (ZOO / "fashion-ensemble" / "card.md").read_text(), {}
    for name in METHODS:
        if row := re.search(rf"^\| `{name}` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", card, re.MULTILINE):
            found[name] = (row[1].strip(), row[2].strip(), row[3].strip())
    return found


def gears() -> dict[str, tuple[float, float, float, float]]:
    """Class accuracy, Frechet distance and its interval by gear, from gears.json of fashion-dit."""
    rows = read_json(ZOO / "fashion-dit" / "gears.json")["gears"]
    return {
        row["name"]: (row["class_accuracy"], row["frechet"]["value"], *row["frechet"]["interval"])
        for row in rows
        if row["name"] in ("full", "balanced")
    }


def cited(work: str) -> str:
    """A sentence for a work, empty where there is no quality to speak of."""
    if work == "classify":
        told = (f"`{name}` accuracy {acc} %, NLL {nll}, ECE {ece}" for name, (acc, nll, ece) in methods().items())
        return f"Quality, calibrated, test images (card of fashion-ensemble): {'; '.join(told)}."
    if work in ("generate", "mixed"):
        told = (
            f"`{name}` Frechet {frechet:.3f} [{low:.3f}, {high:.3f}], classified as label {100 * acc:.1f} %"
            for name, (acc, frechet, low, high) in gears().items()
        )
        return f"Quality at 20 steps (card of fashion-dit; Frechet distance over our own features): {'; '.join(told)}."
    return ""
