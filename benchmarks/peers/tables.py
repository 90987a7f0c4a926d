"""The section for RESULTS.md, of a file of cells. A number is the median over repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.peers.cells import (
    OWN,
    WORKS,
    Cells,
    bars,
    busy,
    capacities,
    contestants,
    every,
    loads,
    middle,
    of,
    ours,
    recovery,
    survived,
    value,
)
from benchmarks.peers.figures import spread
from benchmarks.peers.quality import beside, cited

TITLES = {
    "noop": "(a) no model: an empty request and its answer",
    "sleep": "(b) a model of 20 ms a batch of at most 16",
    "generate": "(c) /generate, fashion-dit, dpmpp_2m, guidance 2, 20 steps",
    "mixed": "(c) /generate, the same with 10 to 50 steps",
    "classify": "(d) /classify, fashion-ensemble, one picture",
}
PLAIN = {
    "noop": "no model",
    "sleep": "20 ms model",
    "generate": "images, 20 steps",
    "mixed": "images, 10 to 50 steps",
    "classify": "classify, ensemble of 5",
}
OURS = {
    "Offramp, same work": ("offramp", "offramp full", "offramp ensemble"),
    "Offramp, early exits": ("offramp balanced", "offramp cascade"),
    "Offramp, bridge": ("offramp bridge",),
}
PEERS = {
    "bentoml": "BentoML",
    "fastapi": "FastAPI with a lock",
    "litserve": "LitServe",
    "mlserver": "MLServer",
    "mosec": "mosec",
    "ray": "Ray Serve",
}
GONE = (
    "never: nothing was answered that was sent in the 4 s after the kill. mosec ends with the last worker of a stage, "
    "and starts another while there is one left; plain FastAPI has nobody to start one."
)
Number = float | None


def text(number: Number) -> str:
    """Three digits that matter, and no more of a larger number than its whole part."""
    if number is None:
        return ""
    return f"{number:.{0 if number == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2}f}"


def percent(part: int, whole: int) -> str:
    """A share, rounded down: 100 % is all of it."""
    return f"{1000 * part // whole / 10:.1f} %" if whole else ""


def lines_of(cells: Cells) -> dict[str, list[str]]:
    """What stands in a line of a table of all works, ours first: its contestants by its name."""
    names = {cell["contestant"] for cell in cells if "contestant" in cell}
    own = {label: [name for name in asked if name in names] for label, asked in OURS.items()}
    peers = {PEERS.get(name, name): [name] for name in sorted(names) if not ours(name)}
    return {label: asked for label, asked in (own | peers).items() if asked}


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def closed_table(cells: Cells, work: str) -> str:
    at, full = loads(cells, work, "closed"), busy(cells, work)
    rows = []
    for name in contestants(cells, work):
        own = {"work": work, "kind": "closed", "contestant": name}
        rates = [middle(cells, "answered_per_s", load=n, **own) for n in at]
        spent = [middle(cells, key, load=full, **own) for key in ("p50_ms", "p99_ms", "cpu_ms", "rss", "pss")]
        failed = sum(cell["failed"] for cell in of(cells, **own))
        alone = middle(cells, "p50_ms", load="1", **own)
        rows.append([name, *map(text, rates), *map(text, [alone, *spent]), str(failed)])
    header = ["closed loop", *(f"answers / s at {n}" for n in at), "p50 ms at 1", f"p50 ms at {full}"]
    return grid([*header, f"p99 ms at {full}", "CPU-ms / answer", "RSS MiB", "PSS MiB", "failed"], rows)


def share_of(load: str) -> str:
    """A load of the open loop in words."""
    return f"{100 * float(load.removeprefix(OWN)):.0f} %{' of its own' if load.startswith(OWN) else ''}"


def open_table(cells: Cells, work: str) -> str:
    rows = []
    for at in loads(cells, work, "open"):
        for name in contestants(cells, work):
            own = {"work": work, "kind": "open", "contestant": name, "load": at}
            if good := value(cells, "goodput_per_s", **own):
                offered = middle(cells, "offered_per_s", **own)
                keys = ("p50_ms", "p95_ms", "p99_ms", "cpu_ms", "failed")
                seen = [middle(cells, key, **own) for key in keys]
                rows.append([
                    share_of(at), name, text(offered), f"{text(good[0])} [{text(good[1])}, {text(good[2])}]",
                    f"{100 * good[0] / (offered or 1):.0f} %", *map(text, seen),
                ])  # fmt: skip
    header = ["load", "open loop", "offered / s", "in time / s", "of offered", "p50 ms", "p95 ms", "p99 ms"]
    return grid([*header, "CPU-ms", "failed"], rows)


def overload_table(cells: Cells) -> str:
    """What is left in time as the load grows past the best peer's capacity: one line a contestant."""
    works = [work for work in WORKS if every(cells, work=work, kind="open")]
    columns = [(work, load) for work in works for load in ("0.8", "1.2") if load in loads(cells, work, "open")]
    if not columns:
        return ""

    def number(asked: Iterable[str], work: str, load: str) -> str:
        own = {"work": work, "kind": "open", "load": load}
        return "".join(text(middle(cells, "goodput_per_s", contestant=name, **own)) for name in asked)

    header = ["in time / s", *(f"{PLAIN[work]}, {share_of(load)}" for work, load in columns)]
    rows = lines_of(cells).items()
    return grid(header, [[label, *(number(asked, work, load) for work, load in columns)] for label, asked in rows])


def back(kills: Cells) -> tuple[Number, str]:
    """Median seconds from the kills to the first answer of a request that was sent after them, and in words."""
    found = spread(cell["back_s"] for cell in kills)
    if found is None:
        return None, "never" if kills else ""
    return found[0], text(found[0]) + (" (not always)" if any(cell["back_s"] is None for cell in kills) else "")


def kill_table(cells: Cells) -> str:
    rows = []
    for work in WORKS:
        for name in contestants(every(cells, kind="kill"), work):
            own = every(cells, work=work, kind="kill", contestant=name)
            answered, accepted = survived(own, [name])
            rows.append([
                TITLES[work], name, str(accepted), str(answered), percent(answered, accepted),
                f"{sum(cell['saved'] for cell in own)} of {sum(cell['held'] for cell in own)}",
                str(sum(cell["refused"] for cell in own)),
                back(own)[1],
            ])  # fmt: skip
    header = ["SIGKILL of the worker", "", "accepted", "answered", "share", "of those in flight", "refused"]
    return f"{grid([*header, 'answers again after s'], rows)}\n\n{GONE}" if rows else ""


def shown(name: str) -> str:
    """A contestant as a reader knows it."""
    return PEERS.get(name) or name.replace("offramp", "Offramp")


def promises(cells: Cells) -> str:
    """The bars, one a line, met or not."""
    verdict = {True: "**Met.**", False: "**Not met.**", None: "Not measured."}
    lines = []
    for bar in bars(cells):
        who, rival = shown(bar["who"]), shown(bar["rival"])
        kind, found, told = beside(bar["who"].partition(" ")[2]), "", verdict[bar["met"]]
        if bar["ratio"] is not None:
            least, most = bar["range"] or (bar["ratio"], bar["ratio"])
            found = f"{bar['ratio']:.2f}x [{least:.2f}, {most:.2f}]. "
            if bar["met"] is None:
                more = f"{rival} had no more to do there; its closed loop does {text(bar['at_most'])} / s."
                told = f"**Not decided**: {more}"
        lines.append(
            f"- {PLAIN[bar['work']]}: {who} at least {bar['bar']:g}x {rival}: {found}{told}"
            f"{f' ({kind})' if kind and found else ''}"
        )
    crash = recovery(cells)
    told = "" if crash["met"] is None else f"{crash['answered']} of {crash['accepted']}. "
    shares = sorted(crash["peers"].items(), key=lambda peer: -peer[1][0] / peer[1][1])
    rest = ", ".join(f"{shown(name)} {percent(*share)}" for name, share in shares)
    lines.append(
        f"- SIGKILL of the worker: Offramp answers all that it accepted: {told}{verdict[crash['met']]}"
        f"{f' ({rest})' if rest else ''}"
    )
    return "\n".join(lines)


def where(cells: Cells) -> str:
    """When, on what, of what the numbers are."""
    head = next(iter(every(cells, kind="head")), {})
    return f"{head.get('date')}, {head.get('machine')}, commit {head.get('commit')}"


def source(cells: Cells) -> str:
    """The command and who was there."""
    head = next(iter(every(cells, kind="head")), {})
    versions = ", ".join(f"{shown(name)} {version}" for name, version in head.get("versions", {}).items())
    return f"`{head.get('command', 'python benchmarks/bench_peers.py')}`{f'; {versions}' if versions else ''}"


def left_out(cells: Cells) -> list[str]:
    """Who is missing where, and why; not who was missing once and came later."""
    skipped = [c for c in every(cells, kind="skip") if c["contestant"] not in contestants(cells, c["work"])]
    return [
        f"Left out: {c['contestant']} in {TITLES[c['work']]}: {c['reason'].strip().splitlines()[-1]}" for c in skipped
    ]


def disturbances(cells: Cells) -> str:
    """How quiet the machine was."""
    measured = [cell for cell in cells if cell["kind"] in ("closed", "open")]
    thrown, noisy = sum(c["discarded"] for c in measured), sum(c["noisy"] for c in measured)
    strangers = spread(cell.get("foreign") for cell in measured)
    used = f" Strangers used {strangers[0]:.2f} cores, {strangers[2]:.2f} at most." if strangers else ""
    return (
        f"{len(measured)} cells of load; {thrown} runs were discarded for foreign CPU load and run again, "
        f"{noisy} cells stayed disturbed at the last try.{used}"
    )


def work_parts(cells: Cells, work: str, pictures: str) -> list[str]:
    """Tables, plot and quality of one work."""
    best, able = capacities(cells, work)
    parts = [f"### {TITLES[work]}", f"Repeats: {repeats(cells, work)}.", closed_table(cells, work)]
    if of(cells, work=work, kind="open"):
        due = sorted({cell["deadline_ms"] for cell in every(cells, work=work, kind="open")})
        rival = max((n for n in able if not ours(n)), key=lambda n: able[n], default="nobody")
        parts.append(
            f"Open loop: loads are shares of {text(best)} / s, the capacity of the best peer ({rival}); deadline "
            f"{'to '.join(f'{ms:.0f} ' for ms in (due[0], due[-1])[: len(due)])}ms for everybody."
        )
        parts.append(open_table(cells, work))
        if pictures:
            parts.append(f"![answers in time by offered load: {PLAIN[work]}]({pictures}/{picture(work)})")
    return [*parts, cited(work)]


def repeats(cells: Cells, work: str) -> str:
    """How often everybody was measured, by the kind of load."""
    found = []
    for kind, words in (("closed", "closed loop"), ("open", "open loop"), ("kill", "kill")):
        counts = Counter((c["contestant"], c["load"]) for c in every(cells, work=work, kind=kind)).values()
        least, most = min(counts, default=0), max(counts, default=0)
        found += [f"{words} {least}" if least == most else f"{words} {least} to {most}"] if most else []
    return ", ".join(found)


def picture(work: str) -> str:
    """File name of a plot."""
    return f"peers-{work}.png"


def section(cells: Cells, pictures: str = "") -> str:
    """What RESULTS.md says; `pictures`: where it finds the plots."""
    head = next(iter(every(cells, kind="head")), {})
    parts = [f"## bench_peers.py, {where(cells)}", f"{source(cells)}."]
    parts += [head.get("protocol", ""), disturbances(cells), *left_out(cells), promises(cells)]
    parts.append(overload_table(cells))
    for work in WORKS:
        if contestants(cells, work):
            parts += work_parts(cells, work, pictures)
    return "\n\n".join(part for part in [*parts, kill_table(cells)] if part) + "\n"
