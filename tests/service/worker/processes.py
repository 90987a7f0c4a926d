"""`offramp` commands as child processes whose registry knows the toys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import REPO, free_port

SITE = Path(__file__).parent / "site"


def toy_models(folder: Path) -> Path:
    """Model folders `toy` and `judge`, and a bridge that no worker serves by itself."""
    for kind, name in (("generator", "toy"), ("ensemble", "judge"), ("bridge", "toy-bridge")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"kind": kind, "name": name}))
    return folder


def environment(models: Path, **settings: str) -> dict[str, str]:
    """This process's environment with OFFRAMP_ variables of our own choice; children run this tree's code."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OFFRAMP_")}
    chosen = {"MODELS": str(models), "WORKER_METRICS_PORT": str(free_port()), "PORT": str(free_port()), **settings}
    return (
        inherited
        | {"PYTHONPATH": os.pathsep.join([str(SITE), str(REPO)]), "TOY_STEP_S": "0.05"}
        | {f"OFFRAMP_{key.upper()}": value for key, value in chosen.items()}
    )


def command(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "service.cli", name]


@contextmanager
def running(name: str, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose output goes to `log`; killed at the end if it still runs."""
    with log.open("ab") as sink:
        process = subprocess.Popen(command(name), env=env, cwd=log.parent, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
