"""Markdown tables of evaluations, and where they go in a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.evaluation.classify import mean_score
from models.store import StoreError

BEGIN, END = "<!-- numbers: written by `offramp eval --write` -->", "<!-- end of numbers -->"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A pipe table; numbers are strings already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(where: dict[str, str]) -> str:
    """The line that says where numbers come from."""
    return f"Measured {where['date']} on {where['machine']}, commit {where['commit']}."


def gears_table(result: dict[str, Any], n: int, seed: int, batch: int, where: dict[str, str]) -> str:
    """One row per gear."""
    first = result["gears"][0].gear
    rows = [
        [
            s.gear.name,
            f"{s.layer_evals_per_image:.0f}",
            f"{1 - s.layer_evals_ratio:.1%}",
            f"{1 / s.time_ratio:.2f}x",
            f"{s.class_accuracy:.1%}",
            f"{s.frechet:.3f} [{s.frechet_low:.3f}, {s.frechet_high:.3f}]",
        ]
        for s in result["gears"]
    ]
    low, high = result["floor_interval"]
    rows.append(["real training images", "", "", "", "", f"{result['floor']:.3f} [{low:.3f}, {high:.3f}] (floor)"])
    header = ["gear", "layer evals / image", "saved", f"throughput, batch {batch}", "classified as label"]
    table = markdown([*header, "Frechet distance [95 %]"], rows)
    how = (
        f"{n} label-balanced images per gear, seed {seed}; {first.solver}, {first.steps} steps, guidance "
        f"{first.guidance:g}, the same noise for every gear."
    )
    return f"{table}\n\n{how} {origin(where)}"


def spread(found: dict[str, float] | None) -> str:
    """Mean, with the standard error where there are seeds."""
    if found is None:
        return ""
    error = f" ± {found['se']:.2f}" if "se" in found else ""
    return f"{found['mean']:.2f}{error}"


def classify_table(
    result: dict[str, Any],
    costs: dict[str, float],
    times: dict[str, float],
    detection: dict[str, float],
    where: dict[str, str],
) -> str:
    """One row per method; several seeds are averaged."""
    rows = []
    for name, scores in result["rows"].items():
        s = mean_score(scores)
        timed = times.get("bridge x1" if name == "regressor x1" else name, 1.0)
        rows.append(
            [
                name + (f" ({len(scores)} seeds)" if len(scores) > 1 else ""),
                f"{100 * s.acc:.2f}",
                f"{s.nll:.4f}",
                f"{s.cnll:.4f}",
                f"{s.ece:.3f}",
                f"{s.cece:.3f}",
                f"{s.temperature:.2f}",
                spread(result["dee"][name]),
                spread(result["recovered"].get(name)),
                f"{costs[name]:.2f}",
                f"{timed:.2f}",
            ]
        )
    header = ["method", "ACC", "NLL", "cNLL", "ECE", "cECE", "T*", "DEE", "gap to DE-3 recovered", "MACs", "time"]
    table = markdown(header, rows)
    interval = result["recovered"].get("bridge x1", {})
    notes = []
    if "low" in interval:
        notes.append(
            f"Bridge at one evaluation recovers {interval['mean']:.1%} of the calibrated-NLL gap from the source to "
            f"DE-3, 95 % interval [{interval['low']:.1%}, {interval['high']:.1%}] over {interval['n']} seeds."
        )
    if detection:
        scores = ", ".join(f"{k} {v:.3f}" for k, v in detection.items())
        notes.append(f"AUROC of entropy, out-of-distribution against test images: {scores}.")
    notes.append(
        "c: at the method's own validation temperature T*. DE-m is averaged over all subsets of the members (the "
        "largest is one ensemble). x1, x5: network calls of the bridge; the regressor is the same network, its time "
        f"was not measured apart. MACs and time are relative to the source, time at batch 64. {origin(where)}"
    )
    return table + "\n\n" + " ".join(notes)


def write_card(folder: Path, table: str) -> None:
    """Put a table between the markers of card.md."""
    path = folder / "card.md"
    text = path.read_text() if path.is_file() else f"# {folder.name}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise StoreError(f"{path} lacks the lines {BEGIN!r} and {END!r} that the numbers go between")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
