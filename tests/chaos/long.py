"""The long form: thousands of jobs of both kinds while something breaks every few seconds.

    python -m tests.chaos.long [--jobs 10000] [--minutes 30] [--seed N] [--fsync always|everysec] [--every 15]

Three workers, two gateways and one store, all real processes on this machine. Most jobs are drills, some are drawn and
classified by the shipped models and compared with what a first, undisturbed part of the run answered. Prints its
ledger; the exit status is 0 when nothing was lost, nothing came twice and nothing was wrong. With `everysec` the
store's death takes the last second of its file along, as a power cut would.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.audit import audit
from tests.chaos.clients import Ask, Client, Crowd, drill_ask, picture
from tests.chaos.faults import FAULTS, PowerCut
from tests.chaos.fleet import DRILL, POISON, Fleet

SLOW = {**DRILL, "name": "slow", "evaluations": 120}
REAL = ["fashion-dit", "fashion-ensemble", "fashion-bridge", "fashion-distance", "fashion-heads", "fashion-student"]
VARIANTS, REAL_SHARE, SLOW_SHARE, POISONS = 16, 0.05, 0.4, 3
CROWD, LOOK_S = 32, 0.25
TOLERANCE = 1e-3


def real_body(number: int) -> tuple[str, dict[str, Any]]:
    """One of the requests to shipped models."""
    if number % 2:
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
        return "/classify", {"model": "fashion-ensemble", "image": picture(pixels), "deadline_ms": 600_000}
    return "/generate", {
        "model": "fashion-dit",
        "seed": number,
        "label": 3,
        "steps": 8,
        "gear": "balanced",
        "deadline_ms": 600_000,
    }


def outputs(answer: dict[str, Any]) -> Any:
    """What is compared of an answer: pictures byte by byte, probabilities within TOLERANCE."""
    if "images" in answer:
        return [image["b64"] for image in answer["images"]]
    return list(answer["results"][0]["probabilities"].values())


def alike(found: Any, right: Any) -> bool:
    if isinstance(right[0], str):
        return bool(found == right)
    return bool(np.allclose(found, right, atol=TOLERANCE))


def real_ask(number: int, run: str, right: dict[int, Any], **more: Any) -> Ask:
    """A request to a shipped model, judged by what was answered when nothing was broken."""
    variant = number % VARIANTS
    path, body = real_body(variant)

    def judge(answer: dict[str, Any]) -> str:
        known = right.setdefault(variant, outputs(answer))
        return "" if alike(outputs(answer), known) else f"variant {variant} differs from the undisturbed answer"

    return Ask(path, body, f"{run}-real-{number}", judge, **more)


def asks_of(jobs: int, run: str, right: dict[int, Any], draw: random.Random) -> list[Ask]:
    """The whole run's requests, in the order in which they are sent."""
    found = []
    for number in range(jobs):
        poll, share = draw.random() < 0.25, draw.random()
        if share < REAL_SHARE:
            found.append(real_ask(number, run, right, poll=poll))
            continue
        model = SLOW if share < REAL_SHARE + SLOW_SHARE else DRILL
        priority = draw.choice(["high", "normal", "low"])
        found.append(drill_ask(model, number, run, poll=poll, deadline_ms=600_000, priority=priority))
    for number in range(POISONS):
        at = (number + 1) * jobs // (POISONS + 1)
        found.insert(at, drill_ask(POISON, number, run, first=252, expect="failed", deadline_ms=600_000))
    return found


class Breaker:
    """Breaks something every `every` seconds or so, in a thread of its own."""

    def __init__(self, fleet: Fleet, draw: random.Random, every: float, power: PowerCut | None) -> None:
        self._fleet, self._draw, self._every, self._power = fleet, draw, every, power
        self.done: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._break, daemon=True)

    def __enter__(self) -> Breaker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._fleet.tend()

    def _break(self) -> None:
        while not self._over.wait(self._every * self._draw.uniform(0.5, 1.5)):
            name = self._draw.choice(list(FAULTS))
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            self.done[name] += 1
            if name == "kill_store" and self._power:
                self._power(self._fleet)
            else:
                FAULTS[name](self._fleet, self._draw)


def run(jobs: int, minutes: float, seed: int, fsync: str, every: float, folder: Path) -> dict[str, Any]:
    """The ledger of a run."""
    draw, name, right = random.Random(seed), f"run-{seed}", dict[int, Any]()
    served: Sequence[Sequence[dict[str, Any] | str]] = [
        [DRILL, SLOW, *REAL],
        [DRILL, SLOW, *REAL],
        [DRILL, SLOW, POISON],
    ]
    end = time.monotonic() + 60 * minutes
    settings = {"max_deliveries": "5", "deadline_s": "600"}
    with Fleet(folder, served, gateways=2, fsync=fsync, proxied=[1, 2], **settings) as fleet:
        first = (
            Crowd(fleet.ports, [real_ask(n, f"{name}-first", right) for n in range(VARIANTS)], 2, 120).start().join()
        )
        assert all(one.state == "ok" for one in first), [one.troubles for one in first]
        crowd = Crowd(fleet.ports, asks_of(jobs, name, right, draw), CROWD, 300)
        with PowerCut(fleet.store.data_dir) as power:
            with Breaker(fleet, draw, every, power if fsync == "everysec" else None) as breaker:
                began = time.monotonic()
                crowd.start()
                while crowd.busy():
                    time.sleep(LOOK_S)
                    fleet.tend()  # here, because the store dies with the thread that started it
                    if time.monotonic() > end - 60:
                        crowd.stop()
            told = crowd.join()
        fleet.ready()
        found = audit(fleet.redis(), [*first, *told], Client(fleet.ports), exact=fsync == "always")
    return {
        "seed": seed,
        "fsync": fsync,
        "seconds": round(time.monotonic() - began, 1),
        "faults": dict(breaker.done),
        "lives": {member.name: member.lives for member in fleet.members()},
        "lost_bytes": power.lost_bytes,
        "slowest_s": round(max(one.seconds for one in told), 1),
        **found.as_dict(),
        "sound": found.sound,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30.0, help="nothing new is asked in the last of these")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults, give or take half")
    parser.add_argument("--keep", type=Path, help="folder for logs and data; else they are thrown away")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = run(
            chosen.jobs, chosen.minutes, chosen.seed, chosen.fsync, chosen.every, chosen.keep or Path(folder) / "run"
        )
    print(json.dumps(found, indent=1))
    return 0 if found["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
