"""Offramp beside LitServe, BentoML, Ray Serve, mosec, MLServer and plain FastAPI with a lock, around the same models.

    python benchmarks/bench_peers.py                    the short form, three minutes at most
    python benchmarks/bench_peers.py --install          make the peers' environments (2 minutes and 5 GB)
    python benchmarks/bench_peers.py --long --out FILE  the long form; --resume FILE goes on with one
    python -m benchmarks.peers.report FILE [--write]    tables of what there is; README, RESULTS.md and plots

    --only sleep mixed mosec offramp     some works, some contestants
    --venvs DIR                          where the environments are (.offramp/peers)
    PEERS_SPREAD=1                       contestants may use the client's core too

Work: `noop`; `sleep`, 20 ms a batch of at most 16; `generate`, fashion-dit at 20 steps; `mixed`, the same at 10 to
50; `classify`, one picture, the ensemble of five in the peers, `ensemble`, `bridge` and `cascade` here. Every
contestant has one worker process of one torch thread, and all of its processes on all cores but the last, which is the
client's. Everybody's answers are checked before they are timed. A peer batches requests, at most as many and waiting as
long as `TUNING` and `WAITS` in peers/contestants.py say, at full depth; the docstrings in peers/apps give its settings
and their sources.

Closed loop at 1, 32 and 128 connections; from that capacity (the best of 32 and 128) and the deadline (three times the
median latency at one connection of the slowest contestant, the same for all; Offramp is told it in `deadline_ms`, a
peer in the timeout that it has). Open loop with Poisson arrivals at 50, 80 and 120 % of the best peer's capacity, and
at 90 % of the contestant's own; at 60 % of its own too where that is less than half of the best peer's. Then half of
its own capacity while the worker process gets SIGKILL: nobody retries. Runs in which strangers used more than 0.1 core
are run again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish
from benchmarks.peers import venvs
from benchmarks.peers.campaign import Campaign, Plan
from benchmarks.peers.cells import WORKS, kept, line, read, summary
from benchmarks.peers.contestants import CLIENT, SERVERS, TUNING, names
from benchmarks.peers.report import readme
from benchmarks.peers.tables import section

FILES = ("--out", "--resume", "--venvs")
PROTOCOL = (
    "One worker process and one torch thread each; a contestant's processes run on cores {servers}, the client on core "
    "{client}. {repeats} repeats, order turned and reversed; medians, [least, greatest]. Peers batch at most {batch} "
    "requests; Offramp has {slots} slots. Offramp is told the deadline of every request, a peer has it as its timeout, "
    "where it has one (MLServer and FastAPI have none). noop and sleep: only Offramp decodes the picture."
)


def command(argv: Sequence[str]) -> str:
    """What was asked for, without the places of files."""
    pairs = zip(["", *argv], argv, strict=False)
    said = [word for before, word in pairs if before not in FILES and not word.startswith(FILES)]
    return " ".join(["python benchmarks/bench_peers.py", *said])


def head(plan: Plan) -> dict[str, Any]:
    """What the tables say of a run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"], capture_output=True, text=True, cwd=venvs.REPO
    )
    batches = {work: plan.batch or TUNING[work].batch for work in plan.works}
    return {
        "kind": "head",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}",
        "commit": commit.stdout.strip(),
        "command": command(sys.argv[1:]),
        "versions": {name: venvs.version(name) for name in plan.contestants if name != "offramp"},
        "protocol": PROTOCOL.format(
            servers=", ".join(map(str, SERVERS)),
            client=", ".join(map(str, CLIENT)),
            repeats=plan.repeats,
            batch=", ".join(f"{n} ({work})" for work, n in batches.items()),
            slots=", ".join(f"{TUNING[work].slots} ({work})" for work in plan.works),
        ),
    }


def plan_of(chosen: argparse.Namespace) -> Plan:
    """The long form, the short one, and what was said beside."""
    wanted = [name for name in chosen.only if name not in WORKS]
    works = [work for work in WORKS if work in chosen.only] or list(WORKS)
    plan = Plan(works, names(wanted), chosen.venvs)
    if not chosen.long:
        there = [n for n in plan.contestants if n not in missing(plan)]
        if not chosen.only:  # what fits into three minutes
            works = ["sleep", "classify", "mixed"] if len(there) < 4 else ["sleep"]
        plan = replace(
            plan, works=works, repeats=1, connections=(1, 16), loads=(0.8,), own=(), seconds=2.0,
            warmup_s=1.0, slow=2.0, kills=1, killed=("sleep",), kill_s=(1.0, 3.0), tries=1, budget_s=140.0,
        )  # fmt: skip
    words = ("repeats", "seconds", "closed_seconds", "own", "foreign", "batch", "budget_s", "kills")
    said = {name: getattr(chosen, name) for name in words}
    return replace(plan, **{name: value for name, value in said.items() if value is not None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--long", action="store_true", help="the long form")
    form.add_argument("--short", action="store_true", help="the short form, as without any option")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[*WORKS, *names([])])
    parser.add_argument("--venvs", type=Path, default=venvs.FOLDER, help="folder of the peers' environments")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing first")
    parser.add_argument("--out", type=Path, help="keep cells here, one a line, as they are done")
    parser.add_argument("--resume", type=Path, help="as --out, but go on with what is there")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--kills", type=int, help="repeats of the kill")
    parser.add_argument("--seconds", type=float, help="of each cell of a fast work")
    parser.add_argument("--closed-seconds", type=float, help="as --seconds, of the closed loops where these differ")
    parser.add_argument("--own", type=float, nargs="*", metavar="SHARE", help="loads in capacities of its own")
    parser.add_argument("--foreign", type=float, help="cores that strangers may use")
    parser.add_argument("--batch", type=int, help="the peers' most requests in a batch, for every work")
    parser.add_argument("--budget-s", type=float, help="begin no cell later than this")
    return parser.parse_args()


def missing(plan: Plan) -> list[str]:
    """Peers that have no environment."""
    return [name for name in plan.contestants if name in venvs.PEERS and not venvs.python(plan.venvs, name)]


def install(plan: Plan) -> dict[str, str]:
    """Make what is missing; says what cannot be, and returns why."""
    reasons = {}
    for name in plan.contestants:
        if name in venvs.PEERS:
            why = venvs.make(plan.venvs, name)
            print(f"{name} {venvs.version(name)}: {why or 'installed'}", flush=True)
            if why:
                reasons[name] = why
    return reasons


def main() -> None:
    chosen = parse()
    torch.set_num_threads(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16384)), hard))
    plan = plan_of(chosen)
    reasons = dict.fromkeys(missing(plan), "not installed: --install makes its environment")
    if chosen.install or chosen.long:
        reasons = install(plan)
    out = chosen.resume or chosen.out
    if chosen.out and chosen.out.exists():
        raise SystemExit(f"{chosen.out} is there: --resume goes on with it")
    cells = read(out) if out and out.exists() else []
    cells = [cell for cell in cells if cell["kind"] != "skip" or cell["contestant"] in reasons]  # others try again

    def keep(cell: dict[str, Any]) -> None:
        if out:
            with out.open("a") as sink:
                sink.write(line(cell))

    campaign = Campaign(plan, cells, keep, lambda line: print(line, flush=True))
    if not any(cell["kind"] == "head" for cell in cells):
        campaign.cells.append(head(plan))
        keep(campaign.cells[-1])
    campaign.leave_out(reasons)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    campaign.run()
    if campaign.left:
        print("Not run, for lack of time where no reason is given:", "; ".join(campaign.left), "\n")
    found = [*map(kept, campaign.cells)]
    print(section(found), readme(found), sep="\n")
    finish("peers", **summary(found))


if __name__ == "__main__":
    main()
