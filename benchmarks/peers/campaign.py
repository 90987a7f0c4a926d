"""Runs cells: one contestant (and way of asking it), one work, one load, one repeat, each kept as soon as it is done.

For every work: closed loop, from which capacity and the deadline follow; then open loop, where everybody knows the
deadline; then the kill. The order of the contestants turns with every repeat, and every other one is reversed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from benchmarks.bench_queue import load
from benchmarks.peers import accounting
from benchmarks.peers.cells import OWN, Cells, capacities, deadline_ms
from benchmarks.peers.check import wrong
from benchmarks.peers.contestants import CLIENT, PATIENT_S, Contestant, contestant, variants
from benchmarks.peers.figures import LOST, OK, kill_figures, load_figures, window

Cell = dict[str, Any]
SLOW = ("generate", "mixed")
LATE_S = 2.0  # after an open loop nobody waits longer for what is late already
DRAIN_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        connections: of the closed loops.
        loads: of the open loops, in capacities of the best peer; `own` more of them, in the contestant's own: the
            greatest always, the others where they are below all of `loads`, for those that cannot do so much.
        seconds: measured, of a fast work; `warmup_s` goes before. `slow`: times as long for slow works.
        closed_seconds: as `seconds`, of the closed loops where these differ.
        closed: works without an open loop.
        kills: repeats of the kill, for the works in `killed`; `kill_s`: when it comes, and when requests end.
        patience_s: how long the client waits for answers after that.
        foreign: cores that strangers may use, else a cell is run again, `tries` times in all.
        budget_s: no cell begins later than this after the start; 0: no limit.
    """

    works: Sequence[str]
    contestants: Sequence[str]
    venvs: Path
    repeats: int = 5
    connections: Sequence[int] = (1, 32, 128)
    loads: Sequence[float] = (0.5, 0.8, 1.2)
    own: Sequence[float] = (0.6, 0.9)
    seconds: float = 4.0
    closed_seconds: float = 0.0
    slow: float = 1.5
    warmup_s: float = 1.0
    closed: Sequence[str] = ("noop",)
    kills: int = 5
    killed: Sequence[str] = ("sleep", "generate")
    kill_s: tuple[float, float] = (2.0, 6.0)
    patience_s: float = 30.0
    deadline_x: float = 3.0
    foreign: float = 0.1
    tries: int = 4
    budget_s: float = 0.0
    batch: int = 0


@dataclass
class Campaign:
    """The cells so far, those of an interrupted run among them; `keep` is called with each new one.

    `behind`: the last one left requests that the contestant may still be working on: it is started anew.

    Answers are checked before the first closed loop, where nobody's time is short.
    """

    plan: Plan
    cells: Cells = field(default_factory=list)
    keep: Callable[[Cell], None] = lambda cell: None
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        measured = [cell for cell in self.cells if cell["kind"] == "closed"]
        self.checked = {(cell["work"], cell["contestant"].partition(" ")[0]) for cell in measured}
        self.left: list[str] = []
        self.behind = False

    def run(self) -> None:
        """Every cell that is not there yet."""
        plan = self.plan
        for work in plan.works:
            for repeat in range(plan.repeats):
                self.round(work, "closed", repeat, {str(n): float(n) for n in plan.connections}, PATIENT_S)
            due = deadline_ms(self.cells, work, plan.deadline_x)
            for repeat in range(plan.repeats if due and work not in plan.closed else 0):
                self.round(work, "open", repeat, self.rates(), (due or 0.0) / 1000)
            for repeat in range(plan.kills if work in plan.killed else 0):
                self.round(work, "kill", repeat, {"0.5": 0.5}, PATIENT_S)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Contestants that are not there, and why; a word in every work's table."""
        for work in self.plan.works:
            for name, why in reasons.items():
                if not any(same(c, work=work, kind="skip", contestant=name) for c in self.cells):
                    self.add({"kind": "skip", "work": work, "contestant": name, "reason": why})

    def rates(self) -> dict[str, float]:
        return {f"{x:g}": x for x in self.plan.loads} | {f"{OWN}{x:g}": x for x in self.plan.own}

    def due(self, work: str, name: str, load: str) -> bool:
        """Whether a load is one for this contestant."""
        if not load.startswith(OWN) or (share := self.rates()[load]) == max(self.plan.own):
            return True
        best, able = capacities(self.cells, work)
        return share * able.get(name, 0.0) < min(self.plan.loads) * best

    def order(self, repeat: int) -> list[str]:
        """Contestants, turned by one with every repeat, and reversed in every other one."""
        names = list(self.plan.contestants)
        turned = names[repeat % len(names) :] + names[: repeat % len(names)]
        return turned[::-1] if repeat % 2 else turned

    def round(self, work: str, kind: str, repeat: int, loads: dict[str, float], timeout_s: float) -> None:
        """One phase of one repeat, contestant by contestant."""
        for name in self.order(repeat):
            if self.over():
                self.left.append(f"{work} {kind} {name}")
            else:
                self.turn(work, name, kind, repeat, loads, timeout_s)

    def over(self) -> bool:
        return bool(self.plan.budget_s) and time.monotonic() - self.began > self.plan.budget_s

    def turn(self, work: str, name: str, kind: str, repeat: int, loads: dict[str, float], timeout_s: float) -> None:
        """Start a contestant, run its cells of one phase, stop it."""
        there = {(c["contestant"], c["load"]) for c in self.cells if same(c, work=work, kind=kind, repeat=repeat)}
        if any(same(c, work=work, kind="skip", contestant=name) for c in self.cells):
            return
        asked = variants(name, work)[: 1 if kind == "kill" else None]
        due = [
            (variant, at)
            for variant in asked
            for at in loads
            if (called(name, variant), at) not in there and self.due(work, called(name, variant), at)
        ]
        if not due:
            return
        who = self.started(work, name, timeout_s)
        if who is None:
            return
        try:
            if (work, name) not in self.checked and (why := wrong(who)):
                self.add({"kind": "skip", "work": work, "contestant": name, "reason": f"wrong answers: {why}"})
                return
            self.checked.add((work, name))
            for variant, at in due:
                if self.over():
                    self.left.append(f"{work} {kind} {called(name, variant)} {at}")
                    continue
                where = {"work": work, "contestant": called(name, variant), "kind": kind, "load": at}
                self.cell(who, variant, {**where, "repeat": repeat}, loads[at], timeout_s)
                if (variant, at) != due[-1] and self.behind:
                    who.stop()
                    who.start(timeout_s)
        except (RuntimeError, OSError, ValueError, SubprocessError) as error:  # a resumed run tries again
            self.left.append(f"{work} {kind} {name}: {error!r}"[:300])
            self.say(self.left[-1])
        finally:
            who.stop()

    def started(self, work: str, name: str, timeout_s: float) -> Contestant | None:
        """A contestant that answers; None, and the reason kept, when it twice does not."""
        for last in (False, True):
            try:
                who = contestant(name, work, self.plan.venvs, self.plan.batch)
                who.start(timeout_s)
                return who
            except RuntimeError as error:
                if last:
                    self.add({"kind": "skip", "work": work, "contestant": name, "reason": str(error)[-400:]})
        return None

    def cell(self, who: Contestant, variant: str, where: Cell, load_: float, timeout_s: float) -> None:
        """Measure one cell, again while strangers use too much of the machine."""
        measure = {"closed": self.closed, "open": self.open, "kill": self.kill}[where["kind"]]
        for discarded in range(self.plan.tries):
            if discarded:  # what the run before left behind goes first
                who.ready()
            found = measure(who, variant, where, load_, timeout_s)
            if found is None:
                return
            found |= {"discarded": discarded, "noisy": found["foreign"] > self.plan.foreign}
            if where["kind"] == "kill" or not found["noisy"]:
                break
        self.add(where | found)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.keep(cell)
        shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in cell.items() if k not in ("rss", "pss")}
        self.say(f"[{time.monotonic() - self.began:6.0f} s] {json.dumps(shown)}")

    def sent(self, who: Contestant, variant: str, plan: dict[str, Any], deadline_s: float) -> tuple[Any, Cell]:
        """Run the client; what it saw, and what the machine spent."""
        before = accounting.usage(who.mark)
        plan = {"requests": who.wire(variant, deadline_s), "cpus": CLIENT, "uvloop": True, **plan}
        seen = load(who.port, plan)
        after = accounting.usage(who.mark)
        elapsed = after.at - before.at
        answered = sum(status == OK for *_, status in seen["seen"])
        self.behind = any(status == LOST for *_, status in seen["seen"])
        return seen["seen"], {
            "foreign": accounting.foreign(before, after, seen["cpu_s"]),
            "cpu_ms": 1000 * accounting.own_s(before, after) / max(1, answered),
            "cores": accounting.own_s(before, after) / elapsed,
            "client_cores": seen["cpu_s"] / elapsed,
            **accounting.resident_mib(accounting.members(who.mark)),
        }

    def length(self, work: str, seconds: float) -> float:
        return seconds * (self.plan.slow if work in SLOW else 1)

    def closed(self, who: Contestant, variant: str, where: Cell, connections: float, timeout_s: float) -> Cell:
        start = self.plan.warmup_s
        seconds = self.length(where["work"], self.plan.closed_seconds or self.plan.seconds)
        last = int(connections) == max(self.plan.connections)
        plan = {"connections": int(connections), "seconds": start + seconds, "patience_s": 0.5 if last else DRAIN_S}
        seen, spent = self.sent(who, variant, plan, timeout_s)
        return load_figures(window(seen, start, start + seconds, "end"), seconds, timeout_s) | spent

    def open(self, who: Contestant, variant: str, where: Cell, share: float, deadline_s: float) -> Cell | None:
        best, able = capacities(self.cells, where["work"])
        capacity = able.get(where["contestant"], 0.0) if where["load"].startswith(OWN) else best
        if not capacity:
            return None
        start, seconds = self.plan.warmup_s, self.length(where["work"], self.plan.seconds)
        plan = {"rate": share * capacity, "seconds": start + seconds, "seed": where["repeat"]}
        seen, spent = self.sent(who, variant, plan | {"patience_s": max(LATE_S, 2 * deadline_s)}, deadline_s)
        inside = window(seen, start, start + seconds, "due")
        return load_figures(inside, seconds, deadline_s) | spent | {"deadline_ms": 1000 * deadline_s}

    def kill(self, who: Contestant, variant: str, where: Cell, share: float, timeout_s: float) -> Cell | None:
        """Half of its own capacity while its worker gets SIGKILL; then nothing but patience."""
        capacity = capacities(self.cells, where["work"])[1].get(where["contestant"])
        if not capacity:
            return None
        killed_s, seconds = self.plan.kill_s
        plan = {"rate": share * capacity, "seconds": seconds, "seed": where["repeat"]}
        plan |= {"patience_s": self.plan.patience_s, "kill": [who.worker(), killed_s]}
        seen, spent = self.sent(who, variant, plan, timeout_s)
        return kill_figures(seen, killed_s) | spent


def called(name: str, variant: str) -> str:
    """A contestant's name in the tables."""
    return f"{name} {variant}".strip()


def same(cell: Cell, **wanted: Any) -> bool:
    """Whether a cell has these values."""
    return all(cell.get(key) == value for key, value in wanted.items())
