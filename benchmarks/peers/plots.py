"""Answers in time by offered load, one picture a work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import WORKS, Cells, best_goodput, contestants, every, loads, middle
from benchmarks.peers.tables import OURS, PEERS, PLAIN, picture, shown, text

Points = dict[str, list[tuple[float, float]]]
OWN = "#d1242f"
MUTED = ("#4e79a7", "#8c8c8c", "#59a14f", "#9c755f", "#7b6ba8", "#c2913c")
MARKERS = ("s", "^", "D", "v", "P", "X")
KEY = "points"  # of the PNG's text


def points(cells: Cells, work: str) -> Points:
    """Offered and answered in time, per second, of every contestant, by offered load."""
    found: Points = {}
    for name in contestants(every(cells, kind="open"), work):
        own = {"work": work, "kind": "open", "contestant": name}
        at = [(middle(cells, "offered_per_s", load=load, **own), load) for load in loads(cells, work, "open")]
        pairs = [(x, middle(cells, "goodput_per_s", load=load, **own)) for x, load in at if x is not None]
        found[name] = sorted((x, y) for x, y in pairs if y is not None)
    return found


def stamps(cells: Cells) -> dict[str, str]:
    """The text that every picture carries, by file name: its points, to tell whether it is of these cells."""
    found = {picture(work): points(cells, work) for work in WORKS}
    return {name: json.dumps(drawn) for name, drawn in found.items() if drawn}


def plots(cells: Cells, folder: Path) -> list[Path]:
    """One picture for every work that has an open loop, in place of those that were there."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("peers-*.png"):
        old.unlink()
    return [plot(cells, work, folder / picture(work)) for work in WORKS if points(cells, work)]


def styles() -> dict[str, dict[str, Any]]:
    """Ours in one strong colour, the peers in muted ones that they keep from picture to picture."""
    found: dict[str, dict[str, Any]] = {
        name: {"color": OWN, "linestyle": dashes, "linewidth": 2.4, "marker": "o", "mfc": inside, "zorder": 3}
        for asked, (dashes, inside) in zip(OURS.values(), (("-", OWN), ("--", "white"), (":", "#f6b3b8")), strict=True)
        for name in asked
    }
    for i, name in enumerate(PEERS):
        found[name] = {"color": MUTED[i], "linewidth": 1.4, "marker": MARKERS[i], "markersize": 5}
    return found


def plot(cells: Cells, work: str, file: Path) -> Path:
    from matplotlib.figure import Figure

    drawn, due = points(cells, work), middle(cells, "deadline_ms", work=work, kind="open")
    most = max(x for line in drawn.values() for x, _ in line)
    figure = Figure(figsize=(7.6, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot([0, most], [0, most], color="0.85", linewidth=1.2, zorder=0)
    axes.annotate("all of it", (0.97 * most, most), color="0.6", fontsize=8, ha="right", va="bottom")
    style = styles()
    for name in sorted(drawn, key=lambda name: -(best_goodput(cells, work, name) or 0.0)):
        label = f"{shown(name)}: {text(best_goodput(cells, work, name))}"
        axes.plot(*zip(*drawn[name], strict=True), label=label, **style.get(name, {}))
    axes.set(xlabel="offered / s", ylabel="answered in time / s", xlim=(0, 1.03 * most), ylim=(-0.01 * most, None))
    axes.set_title(f"{PLAIN[work]}: deadline {due or 0:.0f} ms", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.93")
    legend = {"title": "at its best, / s", "alignment": "left", "frameon": False, "fontsize": 9, "handlelength": 3.2}
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), **legend)
    figure.savefig(file, dpi=120, metadata={KEY: stamps(cells)[file.name]})
    return file
