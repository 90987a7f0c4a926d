"""The tables and plots of a file of cells: `python -m benchmarks.peers.report FILE [--plots DIR]`.

First the section for RESULTS.md, then the short table for the README. A number is the median over repeats; cells that
strangers disturbed to the last try count only where no other is left, and are said.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import spread
from benchmarks.peers.quality import cited

Cells = list[dict[str, Any]]
TITLES = {
    "noop": "(a) no-op",
    "sleep": "(b) a model of 20 ms a batch of at most 16",
    "generate": "(c) /generate, fashion-dit, dpmpp_2m, guidance 2, 20 steps",
    "mixed": "(c) /generate, the same with 10 to 50 steps",
    "classify": "(d) /classify, fashion-ensemble, one picture",
}
FIELD = 3  # fewer peers than that have no best
BARS = (
    ("sleep", "offramp", "mosec", 0.95),
    ("sleep", "offramp", "best other", 1.0),
    ("mixed", "offramp full", "best peer", 1.3),
    ("mixed", "offramp balanced", "best peer", 1.7),
    ("classify", "offramp cascade", "best peer", 2.5),
)


def read(path: Path) -> Cells:
    """The cells of a file, one JSON object a line; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def of(cells: Iterable[dict[str, Any]], **wanted: Any) -> Cells:
    """Cells with these values; the disturbed ones only when there are no others."""
    found = [cell for cell in cells if all(cell.get(k) == v for k, v in wanted.items())]
    return [cell for cell in found if not cell.get("noisy")] or found


def value(cells: Cells, key: str, **wanted: Any) -> list[float] | None:
    """Median, least and greatest of a number over repeats."""
    return spread(cell.get(key) for cell in of(cells, **wanted))


def middle(cells: Cells, key: str, **wanted: Any) -> float | None:
    """The median alone."""
    found = value(cells, key, **wanted)
    return found[0] if found else None


def contestants(cells: Cells, work: str) -> list[str]:
    """Those with cells of this work, Offramp first, the others by name."""
    names = {c["contestant"] for c in cells if c.get("work") == work and c["kind"] != "skip"}
    return sorted(names, key=lambda name: (not ours(name), name))


def loads(cells: Cells, work: str, kind: str) -> list[str]:
    """Loads of a kind of cells, in the order in which they came."""
    return list(dict.fromkeys(c["load"] for c in cells if c.get("work") == work and c["kind"] == kind))


def ours(name: str) -> bool:
    return name.startswith("offramp")


def capacities(cells: Cells, work: str) -> tuple[float, dict[str, float]]:
    """Requests per second of the best peer and of everybody: the best closed loop of more than one connection."""
    able = {}
    for name in contestants(cells, work):
        wanted = {"work": work, "kind": "closed", "contestant": name}
        rates = [middle(cells, "answered_per_s", load=at, **wanted) for at in loads(cells, work, "closed") if at != "1"]
        able[name] = max((rate for rate in rates if rate), default=0.0)
    return max((rate for name, rate in able.items() if not ours(name)), default=0.0), able


def deadline_ms(cells: Cells, work: str, times: float) -> float | None:
    """So many times the median latency of the slowest contestant at one connection."""
    wanted = {"work": work, "kind": "closed", "load": "1"}
    alone = [middle(cells, "p50_ms", contestant=name, **wanted) for name in contestants(cells, work)]
    return times * max(a for a in alone if a) if any(alone) else None


def best_goodput(cells: Cells, work: str, name: str) -> float | None:
    """The most right answers in time per second that a contestant gave at any of the open loads."""
    wanted = {"work": work, "kind": "open", "contestant": name}
    rates = [middle(cells, "goodput_per_s", load=at, **wanted) for at in loads(cells, work, "open")]
    return max((rate for rate in rates if rate is not None), default=None)


def bars(cells: Cells) -> list[dict[str, Any]]:
    """What was promised, and what came of it, by the best goodput of each; nothing where the rivals were not there."""
    found = []
    for work, who, against, wanted in BARS:
        able = {name: best_goodput(cells, work, name) or 0.0 for name in contestants(cells, work)}
        others = {n: r for n, r in able.items() if not ours(n) and (against != "best other" or n != "mosec")}
        rival = max(others, key=lambda n: others[n], default="") if against.startswith("best") else against
        if able.get(who) is not None and able.get(rival) and (rival == against or len(others) >= FIELD):
            ratio = able[who] / able[rival]
            found.append(
                {"work": work, "who": who, "rival": rival, "ratio": ratio, "bar": wanted, "met": ratio >= wanted}
            )
    return found


def text(number: float | None, digits: int = 0) -> str:
    return "" if number is None else f"{number:.{digits}f}" if abs(number) >= 10 or digits else f"{number:.1f}"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def closed_table(cells: Cells, work: str) -> str:
    at = loads(cells, work, "closed")
    header = ["closed loop", *(f"answers / s at {n}" for n in at), "p50 ms at 1", *(f"p99 ms at {n}" for n in at[1:2])]
    rows = []
    for name in contestants(cells, work):
        own = {"work": work, "kind": "closed", "contestant": name}
        busy = at[1] if len(at) > 1 else at[0]
        spent = [middle(cells, key, load=busy, **own) for key in ("cpu_ms", "rss", "pss")]
        failed = sum(cell["failed"] for cell in of(cells, **own))
        rows.append([
            name,
            *(text(middle(cells, "answered_per_s", load=n, **own)) for n in at),
            text(middle(cells, "p50_ms", load="1", **own)),
            *(text(middle(cells, "p99_ms", load=n, **own)) for n in at[1:2]),
            text(spent[0], 2), text(spent[1]), text(spent[2]), str(failed),
        ])  # fmt: skip
    return grid([*header, "CPU-ms / answer", "RSS MiB", "PSS MiB", "failed"], rows)


def open_table(cells: Cells, work: str) -> str:
    rows = []
    for at in loads(cells, work, "open"):
        for name in contestants(cells, work):
            own = {"work": work, "kind": "open", "contestant": name, "load": at}
            if good := value(cells, "goodput_per_s", **own):
                lat = [text(middle(cells, key, **own)) for key in ("p50_ms", "p95_ms", "p99_ms")]
                share = good[0] / (middle(cells, "offered_per_s", **own) or 1)
                rows.append([
                    "90 % of its own" if at == "own" else f"{100 * float(at):.0f} %", name,
                    text(middle(cells, "offered_per_s", **own), 1),
                    f"{good[0]:.1f} [{good[1]:.1f}, {good[2]:.1f}]", f"{100 * share:.0f} %", *lat,
                    text(middle(cells, "cpu_ms", **own), 2),
                    text(middle(cells, "failed", **own)),
                ])  # fmt: skip
    header = ["load", "open loop", "offered / s", "in time / s", "of offered", "p50 ms", "p95 ms", "p99 ms"]
    return grid([*header, "CPU-ms", "failed"], rows)


def kill_table(cells: Cells) -> str:
    rows = []
    for work in TITLES:
        for name in contestants([c for c in cells if c["kind"] == "kill"], work):
            own = of(cells, work=work, kind="kill", contestant=name)
            accepted, answered = (sum(cell[key] for cell in own) for key in ("accepted", "answered"))
            back = [cell["back_s"] for cell in own]
            again = spread(back)
            rows.append([
                TITLES[work], name, str(accepted), str(answered), f"{100 * answered / max(1, accepted):.1f} %",
                f"{sum(cell['saved'] for cell in own)} of {sum(cell['held'] for cell in own)}",
                str(sum(cell["refused"] for cell in own)),
                "never" if again is None else f"{again[0]:.1f}" + (" (not always)" if None in back else ""),
            ])  # fmt: skip
    header = [
        "SIGKILL of the worker",
        "",
        "accepted",
        "answered",
        "share",
        "of those in flight",
        "refused",
        "answers again after s",
    ]
    return grid(header, rows) if rows else ""


def section(cells: Cells) -> str:
    """What RESULTS.md says."""
    head = next((c for c in cells if c["kind"] == "head"), {})
    parts = [f"## bench_peers.py, {head.get('date')}, {head.get('machine')}, commit {head.get('commit')}"]
    parts.append(head.get("protocol", ""))
    if head.get("versions"):
        parts.append("Versions: " + ", ".join(f"{name} {v}" for name, v in head["versions"].items()) + ".")
    measured = [cell for cell in cells if cell["kind"] in ("closed", "open")]
    thrown, noisy = sum(c["discarded"] for c in measured), sum(c["noisy"] for c in measured)
    parts.append(
        f"{len(measured)} cells of load; {thrown} runs were discarded for foreign CPU load and run again, "
        f"{noisy} cells stayed disturbed at the last try."
    )
    for cell in cells:
        if cell["kind"] == "skip":
            reason = cell["reason"].strip().splitlines()[-1]
            parts.append(f"Left out: {cell['contestant']} in {TITLES[cell['work']]}: {reason}")
    for work, title in TITLES.items():
        if not contestants(cells, work):
            continue
        best, able = capacities(cells, work)
        parts.append(f"### {title}")
        parts.append(closed_table(cells, work))
        if of(cells, work=work, kind="open"):
            due = middle(cells, "deadline_ms", work=work, kind="open")
            rival = max((n for n in able if not ours(n)), key=lambda n: able[n], default="nobody")
            parts.append(
                f"Open loop: loads are shares of {best:.1f} / s, the capacity of the best peer ({rival}); deadline "
                f"{due or 0:.0f} ms for everybody."
            )
            parts.append(open_table(cells, work))
        if quality := cited(work):
            parts.append(quality)
    parts.append(kill_table(cells))
    parts += [
        f"- Bar, {TITLES[b['work']]}: {b['who']} at least {b['bar']:g}x the goodput of {b['rival']}: "
        f"{b['ratio']:.2f}x. {'Met' if b['met'] else 'Not met'}."
        for b in bars(cells)
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def readme(cells: Cells) -> str:
    """The short table: best goodput of each by work, memory, and what a crash costs."""
    works = [work for work in TITLES if of(cells, work=work, kind="open")]
    everybody = {name for work in works for name in contestants(cells, work)}
    header = ["in time / s", *(TITLES[work].split(",")[0] + f" {work}" for work in works), "PSS MiB", "after a crash"]
    rows = []
    for name in sorted(everybody, key=lambda name: (not ours(name), name)):
        good = [best_goodput(cells, work, name) for work in works]
        lost = of(cells, kind="kill", contestant=name)
        share = sum(c["answered"] for c in lost) / max(1, sum(c["accepted"] for c in lost))
        held = spread(cell["pss"] for cell in cells if cell.get("contestant") == name and "pss" in cell)
        rows.append([name, *map(text, good), text(held[2] if held else None), f"{100 * share:.0f} %" if lost else ""])
    return grid(header, rows) + "\n"


def plots(cells: Cells, folder: Path) -> list[Path]:
    """Goodput by offered load, one picture a work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for work, title in TITLES.items():
        if not of(cells, work=work, kind="open"):
            continue
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
        for name in contestants(cells, work):
            points = []
            for at in loads(cells, work, "open"):
                own = {"work": work, "kind": "open", "contestant": name, "load": at}
                points.append((middle(cells, "offered_per_s", **own), middle(cells, "goodput_per_s", **own)))
            there = sorted((x, y) for x, y in points if x is not None and y is not None)
            style = {"linewidth": 2.2} if ours(name) else {"linewidth": 1.0, "linestyle": "--"}
            axes.plot([x for x, _ in there], [y for _, y in there], marker="o", label=name, **style)
        axes.axline((0, 0), slope=1, color="0.8", zorder=0)
        axes.set(title=title, xlabel="offered / s", ylabel="answered in time / s", xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize=7)
        figure.tight_layout()
        made.append(folder / f"peers-{work}.png")
        figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


def summary(cells: Cells) -> dict[str, Any]:
    """The last line of JSON: the medians that the tables are made of."""
    found: dict[str, Any] = {"bars": bars(cells), "skipped": of(cells, kind="skip"), "works": {}}
    keys = ["answered_per_s", "goodput_per_s", "p50_ms", "p95_ms", "p99_ms", "cpu_ms", "rss", "pss", "failed"]
    keys += ["share", "held", "saved", "back_s"]
    for work in TITLES:
        for cell in cells:
            if cell.get("work") == work and cell["kind"] != "skip":
                own = {key: cell[key] for key in ("work", "kind", "contestant", "load")}
                place = found["works"].setdefault(work, {}).setdefault(cell["contestant"], {})
                numbers = {key: middle(cells, key, **own) for key in keys if key in cell}
                place[f"{cell['kind']} {cell['load']}"] = {k: round(v, 3) for k, v in numbers.items() if v is not None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    chosen = parser.parse_args()
    cells = read(chosen.file)
    print(section(cells))
    print(readme(cells))
    if chosen.plots:
        chosen.plots.mkdir(parents=True, exist_ok=True)
        print("\n".join(map(str, plots(cells, chosen.plots))))


if __name__ == "__main__":
    main()
