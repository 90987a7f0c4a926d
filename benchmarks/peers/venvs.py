"""A virtual environment for each peer, with the versions in NAME.txt beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parent.parent
FOLDER = REPO / ".offramp" / "peers"
PEERS = ("mosec", "litserve", "bentoml", "ray", "mlserver")
DONE = "installed.txt"


def pins(name: str) -> str:
    """What is installed for a peer."""
    return (HERE / f"{name}.txt").read_text()


def python(folder: Path, name: str) -> Path | None:
    """The interpreter of a peer's environment; None unless it was made with these very pins."""
    done = folder / name / DONE
    return folder / name / "bin" / "python" if done.is_file() and done.read_text() == pins(name) else None


def make(folder: Path, name: str) -> str:
    """Make a peer's environment where it is missing; the reason when that fails, else an empty string."""
    if python(folder, name):
        return ""
    target = folder / name
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(target)],
        [str(target / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(HERE / f"{name}.txt")],
    )
    for step in steps:
        ran = subprocess.run(step, capture_output=True, text=True)
        if ran.returncode:
            errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or ran.stderr.splitlines() or ["no reason given"])[-1][:200]
    (target / DONE).write_text(pins(name))
    return ""


def version(name: str) -> str:
    """The pinned version of a peer itself."""
    return pins(name).splitlines()[0].partition("==")[2]
