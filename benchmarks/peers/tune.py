"""How long a peer's batches should wait for more requests: the open loop at one rate, wait by wait.

    python -m benchmarks.peers.tune WORK NAME... --rate R --deadline-ms D [--wait-ms 1 5 25] [--repeats 3]

R requests per second with Poisson arrivals; in time is what was answered within D. What does best here belongs in
`WAITS` of contestants.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import finish, table
from benchmarks.peers import venvs
from benchmarks.peers.campaign import LATE_S, Campaign, Plan
from benchmarks.peers.cells import WORKS
from benchmarks.peers.contestants import HOW, contestant
from benchmarks.peers.figures import load_figures, spread, window

WAITS_MS = (1.0, 5.0, 10.0, 25.0, 50.0)
SHOWN = ("goodput_per_s", "p50_ms", "p99_ms", "cpu_ms", "failed")


def once(campaign: Campaign, work: str, name: str, wait_ms: float, rate: float, due_s: float, seed: int) -> Any:
    """Figures of one run."""
    who, plan = contestant(name, work, campaign.plan.venvs, wait_ms=wait_ms), campaign.plan
    who.start(due_s)
    try:
        seconds = campaign.length(work)
        asked = {"rate": rate, "seconds": plan.warmup_s + seconds, "seed": seed, "patience_s": LATE_S}
        seen, spent = campaign.sent(who, "", asked, due_s)
    finally:
        who.stop()
    return load_figures(window(seen, plan.warmup_s, plan.warmup_s + seconds, "due"), seconds, due_s) | spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("names", nargs="+", choices=[*HOW], metavar="NAME")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--deadline-ms", type=float, required=True)
    parser.add_argument("--wait-ms", type=float, nargs="+", default=WAITS_MS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--venvs", type=Path, default=venvs.FOLDER, help="folder of the peers' environments")
    chosen = parser.parse_args()
    campaign = Campaign(Plan([chosen.work], chosen.names, chosen.venvs))
    runs: dict[tuple[str, float], list[Any]] = {}
    for repeat in range(chosen.repeats):
        for name in chosen.names:
            for wait in chosen.wait_ms:
                found = once(campaign, chosen.work, name, wait, chosen.rate, chosen.deadline_ms / 1000, repeat)
                runs.setdefault((name, wait), []).append(found)
    rows = [
        [name, wait, *((spread(run[key] for run in found) or [None])[0] for key in SHOWN)]
        for (name, wait), found in runs.items()
    ]
    table(["contestant", "wait_ms", *SHOWN], rows)
    finish("tune", work=chosen.work, rate=chosen.rate, deadline_ms=chosen.deadline_ms, waits=rows)


if __name__ == "__main__":
    main()
