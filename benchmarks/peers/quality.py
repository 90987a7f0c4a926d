"""The quality of what is compared, as the cards of the zoo state it: cited, not measured again."""

from __future__ import annotations

import re

from models.store import ZOO, read_json

METHODS = ("ensemble", "bridge", "cascade")
NLL = 1.02  # of the ensemble


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


def worse(way: str) -> str:
    """How a way of answering is worse than the full one by more than the bars allow; empty where it is not.

    `cascade`: a calibrated NLL within 2 % of the ensemble's. `balanced`: a Frechet distance within the 95 % interval of
    that of `full`.
    """
    if way == "cascade":
        mine, whole = (float(methods()[name][1].split()[0]) for name in ("cascade", "ensemble"))
        return "" if mine <= NLL * whole else f"NLL {mine:.4f} against {whole:.4f}"
    if way == "balanced":
        mine, most = gears()["balanced"][1], gears()["full"][3]
        return "" if mine <= most else f"Frechet {mine:.3f} above {most:.3f}"
    return ""


def beside(way: str) -> str:
    """The quality of a cheaper way beside that of the full one; empty for a full one."""
    if way == "cascade":
        return f"NLL {methods()['cascade'][1]}, the ensemble's {methods()['ensemble'][1]}"
    if way == "balanced":
        (_, mine, *_), (_, whole, low, high) = gears()["balanced"], gears()["full"]
        return f"Frechet distance {mine:.3f}, that of `full` {whole:.3f} [{low:.3f}, {high:.3f}]"
    return ""
