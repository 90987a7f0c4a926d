"""Who used the CPU: the processes of one contestant, the client, this one, or strangers (Linux, /proc).

A process belongs to a contestant when the mark is in its environment, or when it descends from one that does: a daemon
keeps the first, a process that overwrote its environment (setproctitle) the second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
MARK = "PEERS_MARK"


@dataclass(frozen=True)
class Process:
    """A line of the process table; `began` (ticks since boot) tells a reused pid apart."""

    pid: int
    parent: int
    began: int
    cpu_s: float


@dataclass(frozen=True)
class Usage:
    """A moment.

    Attributes:
        at: seconds of a monotonic clock.
        machine_s: CPU seconds that the machine's cores have worked, stolen time included, interrupts not: those
            are counted for no process.
        own: CPU seconds of the contestant's processes, by (pid, began).
        here_s: CPU seconds of this process.
    """

    at: float
    machine_s: float
    own: Mapping[tuple[int, int], float]
    here_s: float


def parse_stat(text: str) -> Process:
    """/proc/PID/stat; the command in its second field may hold anything."""
    pid, rest = text.split(" ", 1)
    fields = rest.rpartition(")")[2].split()
    return Process(int(pid), int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / TICKS)


def parse_machine(text: str) -> float:
    """Seconds of user, nice, system and steal in the first line of /proc/stat; guest time is part of user."""
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, text.splitlines()[0].split()[1:9])
    return (user + nice + system + steal) / TICKS


def processes() -> list[Process]:
    """Every process that is there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append(parse_stat(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def marked(mark: str) -> set[int]:
    """Processes with the mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def family(roots: Iterable[int], table: Iterable[Process]) -> dict[int, Process]:
    """The roots that are in the table, and all that descends from them."""
    by_pid, children = {}, dict[int, list[int]]()
    for process in table:
        by_pid[process.pid] = process
        children.setdefault(process.parent, []).append(process.pid)
    found, due = dict[int, Process](), [pid for pid in roots if pid in by_pid]
    while due:
        pid = due.pop()
        if pid not in found:
            found[pid] = by_pid[pid]
            due += children.get(pid, [])
    return found


def members(mark: str) -> dict[int, Process]:
    """The contestant's processes now."""
    return family(marked(mark), processes())


def usage(mark: str) -> Usage:
    """The counters now."""
    machine = parse_machine(Path("/proc/stat").read_text())
    own = {(p.pid, p.began): p.cpu_s for p in members(mark).values()}
    return Usage(time.monotonic(), machine, own, time.process_time())


def own_s(before: Usage, after: Usage) -> float:
    """CPU seconds of the contestant between; of processes that have ended since, nothing is known."""
    return sum(cpu - before.own.get(key, 0.0) for key, cpu in after.own.items())


def foreign(before: Usage, after: Usage, client_s: float) -> float:
    """Cores that neither the contestant nor the client nor this process kept busy; at least 0."""
    used = own_s(before, after) + client_s + after.here_s - before.here_s
    return max(0.0, (after.machine_s - before.machine_s - used) / (after.at - before.at))


def resident_mib(pids: Iterable[int]) -> dict[str, float]:
    """Sum of resident memory: `rss` counts what processes share once for each, `pss` once."""
    found = {"rss": 0.0, "pss": 0.0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(("Rss:", "Pss:")):
                found[line[:3].lower()] += int(line.split()[1]) / 1024
    return found
