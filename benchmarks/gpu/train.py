"""Train and measure the CIFAR-10 models on a GPU that is lent for minutes at a time: one call, one slot.

    python3 -m benchmarks.gpu.train members bridge --data cifar10-jpeg.tar.xz --state STATE --out OUT --minutes 8.5

The stages named run in order, each a command of `offramp` in a process of its own. One that is not done when the
minutes are over leaves its checkpoints, and the same call goes on with it: on the same machine from --work, on a fresh
one from the archives that calls before left in OUT, if they are brought along in STATE. See README.md beside this.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.store import read_json
from models.training.checkpoint import CHECKPOINT, compact
from models.training.exits import SCHEDULES

REPO = Path(__file__).parents[2]
PIECE = 15 << 20  # bytes of a file that comes back
LEAST = {"train": 2.5, "measure": 6.5}  # minutes that are worth starting a stage: only trainings can pause
FILES = 8  # that come back of a call
POOL = "-pool"  # names the archive of a stage's members that are for evaluation alone


@dataclass(frozen=True)
class Stage:
    """A command of offramp: its app and arguments, its recipe, and the model folder that it makes or measures."""

    app: str
    arguments: tuple[str, ...]
    model: str
    recipe: str = ""
    needs: tuple[str, ...] = ()

    @property
    def least(self) -> float:
        """Minutes."""
        return LEAST["train" if self.recipe else "measure"]


def training(command: str, recipe: str, model: str, *more: str, needs: tuple[str, ...] = ()) -> Stage:
    return Stage("models.training.cli", (command, *more), model, recipe, needs)


def measuring(app: str, model: str, *arguments: str, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(app, arguments, model, needs=(model, *needs))


PILOT = ("--pilot", "2.5")
JUDGED = ("--judge", "OUT/cifar-ensemble", "--n", "50000", "--bf16")
STAGES = {
    "pilot-uvit": training("diffusion", "cifar-uvit", "cifar-uvit-base-pilot", *PILOT),
    "pilot-dit": training("diffusion", "cifar-dit", "cifar-dit-base-pilot", *PILOT),
    "uvit": training("diffusion", "cifar-uvit", "cifar-uvit-base"),
    "dit": training("diffusion", "cifar-dit", "cifar-dit-base"),
    "uvit-exits": training("exits", "cifar-exits", "cifar-uvit", needs=("cifar-uvit-base",)),
    "dit-exits": training("exits", "cifar-dit-exits", "cifar-dit", needs=("cifar-dit-base",)),
    "members": training("members", "cifar-ensemble", "cifar-ensemble"),
    "bridge": training("bridge", "cifar-bridge", "cifar-bridge", needs=("cifar-ensemble",)),
    "uvit-profile": measuring(
        "models.evaluation.profile", "cifar-uvit", "--batch", "64", *JUDGED, needs=("cifar-ensemble",)
    ),
    "dit-profile": measuring(
        "models.evaluation.profile", "cifar-dit", "--batch", "64", *JUDGED, needs=("cifar-ensemble",)
    ),
    "classify": measuring("models.evaluation.cli", "cifar-ensemble", "classify", "--write", needs=("cifar-bridge",)),
}


@dataclass(frozen=True)
class Slot:
    """Where things lie on this machine, and when the call shall be over (`time.monotonic()`)."""

    work: Path
    out: Path
    recipes: Path
    device: str
    until: float

    @property
    def models(self) -> Path:
        return self.work / "out"

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def left(self) -> float:
        """Minutes."""
        return (self.until - time.monotonic()) / 60.0

    def done(self, stage: str) -> Path:
        """The closing line of a stage that is finished."""
        return self.work / "done" / f"{stage}.json"


def command(stage: Stage, slot: Slot) -> list[str]:
    """What runs a stage. A typer app of one command takes no name of it, others the first argument."""
    arguments = [a.replace("OUT/", f"{slot.models}/") for a in stage.arguments]
    if stage.recipe:
        recipe = str(slot.recipes / f"{stage.recipe}.toml")
        arguments += ["--recipe", recipe, "--out", str(slot.models), "--minutes", f"{max(0.0, slot.left):.3f}"]
    else:
        at = 1 if arguments[0].isalpha() else 0
        arguments.insert(at, str(slot.models / stage.model))
    run = f"from {stage.app} import app; app()"
    return [sys.executable, "-c", run, *arguments, "--data", str(slot.data), "--device", slot.device]


def run(name: str, slot: Slot) -> dict[str, Any]:
    """One stage, until it is done or the slot is over: its closing line, and what it took."""
    stage, began = STAGES[name], time.monotonic()
    lacking = [model for model in stage.needs if not (slot.models / model / "config.json").is_file()]
    if lacking:
        error = f"needs {', '.join(lacking)}: train it before, or bring its archive in --state"
        return {"stage": name, "finished": False, "error": error}
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    places = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(slot.work / "inductor"), "PYTHONUNBUFFERED": "1"}
    limit = max(1.0, 60.0 * (slot.left + 1.0))  # a training pauses by itself well before
    try:
        with (slot.out / "train.log").open("a") as log:
            ran = subprocess.run(
                command(stage, slot), env=os.environ | places, stdout=subprocess.PIPE, stderr=log, timeout=limit
            )
    except subprocess.TimeoutExpired:
        return {"stage": name, "finished": False, "error": f"killed after {limit:.0f} s"}
    text = ran.stdout.decode()
    print(text, flush=True)
    seconds = round(time.monotonic() - began, 1)
    if ran.returncode:
        print((slot.out / "train.log").read_text()[-3000:], flush=True)
        return {"stage": name, "finished": False, "error": f"exit code {ran.returncode}", "took": seconds}
    with (slot.out / "train.log").open("a") as log:
        log.write(text)
    said = next((line for line in reversed(text.splitlines()) if line.startswith("{")), None)
    if said is None:
        return {"stage": name, "finished": False, "error": "no closing line", "took": seconds}
    closing: dict[str, Any] = {"finished": True, **json.loads(said)}
    if closing["finished"]:
        slot.done(name).parent.mkdir(parents=True, exist_ok=True)
        slot.done(name).write_text(json.dumps(closing))
    return {"stage": name, "took": seconds, **closing}


def prepare(data: Path, slot: Slot) -> None:
    """The images as `offramp train pack` leaves them, from an archive of train/<class>/ and test/<class>/, or from a
    data folder."""
    if slot.data.is_dir():
        return
    raw = data
    if data.is_file():
        raw = slot.work / "raw"
        with tarfile.open(data) as archive:
            unpack(archive, raw)
        raw = raw if (raw / "train").is_dir() else next(p.parent for p in raw.rglob("train"))
    app, fresh = "from models.training.cli import app; app()", slot.data.with_name("data.new")
    packing = [sys.executable, "-c", app, "pack", "--data", str(raw), "--out", str(fresh)]
    subprocess.run(packing, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.DEVNULL, check=True)
    fresh.replace(slot.data)


def keep(name: str, slot: Slot) -> list[Path]:
    """Write what a later call on another machine needs of a stage to OUT, as pieces of archives.

    Of a training that is done its model folder, the members of its pool in an archive apart; of one that is not its
    checkpoints less what can be done without (models.training.checkpoint.compact); of a measurement all but the
    weights, and the cards of what it needs, which it may have written to; of a pilot nothing.
    """
    stage, done = STAGES[name], slot.done(name).is_file()
    model, runs = slot.models / stage.model, slot.models / "runs" / stage.model
    if PILOT[0] in stage.arguments:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        root, aside = Path(scratch) / "kept", Path(scratch) / "pool"
        for folder in (root, aside):
            folder.mkdir()
        pool = read_json(model / "config.json").get("pool", []) if done and stage.recipe else []
        if done:
            skip = shutil.ignore_patterns(*(pool if stage.recipe else ["*.safetensors"]))
            shutil.copytree(model, root / "out" / stage.model, ignore=skip)
            (root / "done").mkdir()
            shutil.copy(slot.done(name), root / "done")
        for path in [model / file for file in pool]:
            copy(path, slot.work, aside)
        for path in [slot.models / other / "card.md" for other in stage.needs if not stage.recipe]:
            copy(path, slot.work, root)
        for path in runs.rglob("*") if stage.recipe else ():
            if path.name in ("log.jsonl", SCHEDULES):
                copy(path, slot.work, root)
            elif path.name == CHECKPOINT and not done:
                compact(path.parent, root / path.parent.relative_to(slot.work))
        return write_pieces(slot.out / name, root) + write_pieces(slot.out / f"{name}{POOL}", aside)


def copy(path: Path, start: Path, to: Path) -> None:
    """A file under `start`, if it is there, to the same place under `to`."""
    if path.is_file():
        there = to / path.relative_to(start)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)


def write_pieces(name: Path, folder: Path) -> list[Path]:
    """What is in the folder, if anything, as one archive in pieces `name`.tar.NN."""
    if not any(folder.iterdir()):
        return []
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for part in sorted(folder.iterdir()):
            archive.add(part, part.name)
    raw, pieces = whole.getvalue(), []
    for i, start in enumerate(range(0, len(raw), PIECE)):
        pieces.append(name.with_name(f"{name.name}.tar.{i:02}"))
        pieces[-1].write_bytes(raw[start : start + PIECE])
    return pieces


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extract what stays inside `folder`; Python before 3.11.4 knows no filters and takes what is there."""
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    archive.extractall(folder)


def restore(state: Path, slot: Slot) -> list[str]:
    """Unpack what `keep` wrote of stages that this machine knows nothing of, and pools, which may come later; their
    names."""
    found = sorted({path.name.split(".tar.")[0] for path in state.glob("*.tar.*")})
    fresh = [name for name in found if name.endswith(POOL) or not known(name, slot)]
    fresh.sort(key=lambda name: not STAGES[stage_of(name)].recipe)  # a measurement changes what a training left
    for name in fresh:
        pieces = sorted(state.glob(f"{name}.tar.*"))
        with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as archive:
            unpack(archive, slot.work)
    return fresh


def stage_of(archive: str) -> str:
    """The stage that an archive of this name is of."""
    return archive.removesuffix(POOL)


def known(name: str, slot: Slot) -> bool:
    """Whether a stage is done on this machine, or was under way."""
    stage = STAGES[name]
    begun = bool(stage.recipe) and (slot.models / "runs" / stage.model).is_dir()
    return begun or slot.done(name).is_file()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, required=True, help="archive of the images, or a data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--state", type=Path, help="folder with what came back of calls before")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "offramp-gpu")
    parser.add_argument("--recipes", type=Path, default=REPO / "models" / "training" / "recipes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5)
    given = parser.parse_args(arguments)
    until = time.monotonic() + 60.0 * given.minutes
    slot = Slot(given.work, given.out, given.recipes, given.device, until)
    for folder in (slot.work, slot.out):
        folder.mkdir(parents=True, exist_ok=True)
    if given.state:
        print("restored:", ", ".join(restore(given.state, slot)) or "nothing", flush=True)
    prepare(given.data, slot)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what there is is kept
    made: list[dict[str, Any]] = []
    for name in given.stages:
        if slot.done(name).is_file():
            continue
        if slot.left < STAGES[name].least:
            print(f"{name} is not begun: {slot.left:.1f} of {STAGES[name].least:g} minutes are left", flush=True)
            break
        try:
            made.append(run(name, slot))
        finally:
            keep(name, slot)
        if not made[-1]["finished"]:
            break
    waiting = [name for name in given.stages if not slot.done(name).is_file()]
    files = [path.stat().st_size for path in slot.out.iterdir() if path.is_file()]
    size = {"files": len(files) + 1, "mib": round(sum(files) / 2**20, 1)}
    summary = {"stages": made, "waiting": waiting, "minutes": round(given.minutes - slot.left, 2), "left": size}
    (slot.out / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    if size["files"] > FILES:
        print(f"{size['files']} files, {FILES} come back: ask for fewer stages a call", file=sys.stderr)
    if size["files"] > FILES or any("error" in stage for stage in made):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
