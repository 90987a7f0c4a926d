"""What a file of cells says: medians over repeats, capacities, the bars.

A cell is one contestant at one work and one load, once. Cells that strangers disturbed to the last try count only
where no other is left, but every kill counts: a lost answer is lost on a busy machine too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import spread
from benchmarks.peers.quality import worse

Cells = list[dict[str, Any]]
WORKS = ("noop", "sleep", "generate", "mixed", "classify")
DIGITS = 4
OWN = "own "  # before a load in a contestant's own capacities
FIELD = 3  # fewer peers than that have no best
ALL = 0.99  # of what was offered
BARS = (
    ("sleep", "offramp", "mosec", 0.95),
    ("sleep", "offramp", "best other", 1.0),
    ("mixed", "offramp full", "best peer", 1.3),
    ("mixed", "offramp balanced", "best peer", 1.7),
    ("classify", "offramp cascade", "best peer", 2.5),
)
WHERE = ("work", "contestant", "kind", "load", "repeat")
SPENT = ("p50_ms", "p95_ms", "p99_ms", "failed", "cpu_ms", "rss", "pss", "foreign", "discarded", "noisy")
KEPT = {
    "closed": (*WHERE, "answered_per_s", *SPENT),
    "open": (*WHERE, "offered_per_s", "answered_per_s", "goodput_per_s", "deadline_ms", *SPENT),
    "kill": (*WHERE, "accepted", "answered", "refused", "held", "saved", "back_s", "foreign", "discarded", "noisy"),
}


def short(value: Any) -> Any:
    """A float to four significant digits, without a fraction where it has none; anything else as it is."""
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded


def kept(cell: dict[str, Any]) -> dict[str, Any]:
    """What tables and a resumed run read of a cell, numbers rounded."""
    return {key: short(cell[key]) for key in KEPT.get(cell["kind"], cell) if key in cell}


def line(cell: dict[str, Any]) -> str:
    """A cell as it stands in a file."""
    return json.dumps(kept(cell), separators=(",", ":")) + "\n"


def read(path: Path) -> Cells:
    """The cells of a file, one JSON object a line; a last line that was cut off is left out."""
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(kept(json.loads(text)))
        except json.JSONDecodeError:
            continue
    return found


def every(cells: Iterable[dict[str, Any]], **wanted: Any) -> Cells:
    """Cells with these values."""
    return [cell for cell in cells if all(cell.get(key) == value for key, value in wanted.items())]


def of(cells: Iterable[dict[str, Any]], **wanted: Any) -> Cells:
    """Cells with these values; the disturbed ones only when there are no others."""
    found = every(cells, **wanted)
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
    """Loads of a kind of cells, the least first, those in own capacities last."""
    found = {cell["load"] for cell in every(cells, work=work, kind=kind)}
    return sorted(found, key=lambda load: (load.startswith(OWN), float(load.removeprefix(OWN))))


def busy(cells: Cells, work: str) -> str:
    """The load of the closed loop at which CPU and memory are read: the first of more than one connection."""
    at = loads(cells, work, "closed")
    return next((load for load in at if load != "1"), "1")


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


def best_load(cells: Cells, work: str, name: str) -> tuple[float, str] | None:
    """The most right answers in time per second that a contestant gave at any of the open loads, and that load."""
    wanted = {"work": work, "kind": "open", "contestant": name}
    rates = [(middle(cells, "goodput_per_s", load=at, **wanted), at) for at in loads(cells, work, "open")]
    return max(((rate, at) for rate, at in rates if rate is not None), default=None)


def best_goodput(cells: Cells, work: str, name: str) -> float | None:
    """The rate of `best_load`."""
    found = best_load(cells, work, name)
    return None if found is None else found[0]


def at_most(cells: Cells, work: str, name: str) -> float:
    """What a contestant might do in time per second: one that answers all it is offered is as good as its closed loop,
    of which less may be in time, at most."""
    rate, at = best_load(cells, work, name) or (0.0, "")
    offered = middle(cells, "offered_per_s", work=work, kind="open", contestant=name, load=at) or 0.0
    return max(rate, capacities(cells, work)[1].get(name, 0.0)) if rate >= ALL * offered else rate


def apart(cells: Cells, work: str, who: str, rival: str) -> tuple[float, float] | None:
    """Least and greatest ratio of two over the repeats, each at the load that is its best by the median."""
    rates = []
    for name in (who, rival):
        _, at = best_load(cells, work, name) or (0.0, "")
        rates.append({c["repeat"]: c["goodput_per_s"] for c in of(cells, work=work, contestant=name, load=at)})
    both = [rates[0][repeat] / rates[1][repeat] for repeat in rates[0] if rates[1].get(repeat)]
    return (min(both), max(both)) if both else None


def survived(cells: Cells, names: Iterable[str]) -> tuple[int, int]:
    """Answered and accepted requests of all runs in which the worker was killed."""
    runs = [cell for cell in cells if cell["kind"] == "kill" and cell["contestant"] in set(names)]
    return sum(cell["answered"] for cell in runs), sum(cell["accepted"] for cell in runs)


def bars(cells: Cells) -> list[dict[str, Any]]:
    """What was promised of goodput, and what came of it, by the best of each; `met` is None where nothing was measured,
    or where the loads do not tell, because the rival might do more than it was offered (`at_most`).

    `worse` says how a cheaper way is worse than the full one by more than the bar allows; a bar is not met then.
    """
    found = []
    for work, who, against, wanted in BARS:
        able = {name: best_goodput(cells, work, name) or 0.0 for name in contestants(cells, work)}
        others = {n: r for n, r in able.items() if not ours(n) and (against != "best other" or n != "mosec")}
        rival = max(others, key=lambda n: others[n], default="") if against.startswith("best") else against
        bar: dict[str, Any] = {"work": work, "who": who, "rival": rival or against, "bar": wanted}
        if able.get(who) is not None and able.get(rival) and (rival == against or len(others) >= FIELD):
            ratio, why = able[who] / able[rival], worse(who.partition(" ")[2])
            most, range_ = at_most(cells, work, rival), apart(cells, work, who, rival)
            met = None if able[who] < wanted * most and ratio >= wanted else ratio >= wanted
            bar |= {"ratio": ratio, "range": range_, "at_most": most, "worse": why, "met": False if why else met}
        else:
            bar |= {"rival": against, "ratio": None, "worse": "", "met": None}
        found.append(bar)
    return found


def recovery(cells: Cells) -> dict[str, Any]:
    """Answered and accepted requests of those whose worker was killed: ours together, and each peer."""
    names = list(dict.fromkeys(cell["contestant"] for cell in cells if cell["kind"] == "kill"))
    shares = {name: survived(cells, [name]) for name in names}
    own = [name for name in names if ours(name)]
    answered, accepted = survived(cells, own)
    rivals = {name: share for name, share in shares.items() if not ours(name) and share[1]}
    met = answered == accepted if accepted else None
    return {"answered": answered, "accepted": accepted, "peers": rivals, "met": met}


def summary(cells: Cells) -> dict[str, Any]:
    """The last line of JSON: the medians that the tables are made of."""
    found: dict[str, Any] = {"bars": bars(cells), "recovery": recovery(cells), "works": {}}
    found["skipped"] = every(cells, kind="skip")
    keys = ["answered_per_s", "goodput_per_s", *SPENT[:7], "accepted", "answered", "held", "saved", "back_s"]
    for cell in cells:
        if "work" in cell and cell["kind"] != "skip":
            own = {key: cell[key] for key in ("work", "kind", "contestant", "load")}
            place = found["works"].setdefault(cell["work"], {}).setdefault(cell["contestant"], {})
            numbers = {key: middle(cells, key, **own) for key in keys if key in cell}
            place[f"{cell['kind']} {cell['load']}"] = {k: round(v, 3) for k, v in numbers.items() if v is not None}
    return found
