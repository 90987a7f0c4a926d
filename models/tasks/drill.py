"""A model that costs nothing and is never wrong by chance: for load benchmarks, canaries and fault drills.

No network and no torch. A row's state is a digest of its image, digested again at every evaluation; its answer is an
exact function of that state. Whoever knows the image can tell with `answer` whether the service mixed up two images,
or lost or repeated an evaluation of one. config.json of such a folder, with the defaults of `Drill`:
`{"kind": "drill", "name": "drill", "evaluations": 3, "step_ms": 10}`.

With `"faults": true` images make trouble in `step` by their first byte (`Fault`). Never serve that to strangers.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from hashlib import blake2b, sha256, shake_128
from pathlib import Path
from typing import Any

from models.api import ClassifiedRow, ClassifyWork, ModelInfo, Runtime, StepStats, UserError
from models.store import StoreError, read_json

COUNT = 4  # bytes of a saved row that count its evaluations
DIGEST = 16


class Fault(IntEnum):
    """First bytes of images that make trouble, every time they are stepped, where the folder allows it."""

    RAISE = 255  # an error
    MEMORY = 254  # MemoryError, in a batch of more rows than `most_rows`
    EXIT = 253  # the worker ends at once
    KILL = 252  # the worker gets SIGKILL
    HANG = 251  # nothing happens for `hang_s`


@dataclass(frozen=True)
class Drill:
    """config.json of a drill model.

    Attributes:
        labels: class names.
        image: height, width, channels.
        evaluations: steps of a row; `step_ms` milliseconds that each takes, whatever the batch.
        batch: rows that one step is for, where it is not 0; a step of more takes as many times as long.
        faults: whether images may make trouble, `most_rows` and `hang_s` how they do it.
    """

    name: str
    task: str = "classify"
    labels: tuple[str, ...] = ("0", "1")
    image: tuple[int, int, int] = (1, 1, 1)
    evaluations: int = 0
    step_ms: float = 0.0
    batch: int = 0
    faults: bool = False
    most_rows: int = 1
    hang_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.task != "classify":
            raise ValueError(f"task must be classify, got {self.task!r}")
        if len(self.labels) < 2:
            raise ValueError("labels must be two or more")
        if len(self.image) != 3 or min(self.image) < 1:
            raise ValueError(f"image must be height, width and channels, got {self.image}")
        if min(self.evaluations, self.step_ms, self.batch) < 0:
            raise ValueError("evaluations, step_ms and batch must not be negative")
        if self.faults and not self.evaluations:
            raise ValueError("faults happen in steps: set evaluations to 1 or more")

    @classmethod
    def read(cls, path: Path) -> Drill:
        """The drill that a config.json describes; StoreError where it does not."""
        config = read_json(path)
        known = {f.name for f in fields(cls)}
        if unknown := set(config) - known - {"kind"}:
            raise StoreError(f"{path}: a drill has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "kind"}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{path}: {error}") from None


def begin(image: bytes) -> bytes:
    """The state of a row that had no evaluation."""
    return blake2b(image, digest_size=DIGEST).digest()


def advance(state: bytes) -> bytes:
    """The state one evaluation on."""
    return blake2b(state, digest_size=DIGEST).digest()


def probabilities(state: bytes, classes: int) -> tuple[float, ...]:
    """What a row in this state answers."""
    raw = shake_128(state).digest(2 * classes)
    weights = [1 + int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2)]
    return tuple(weight / sum(weights) for weight in weights)


def answer(image: bytes, evaluations: int, classes: int) -> tuple[float, ...]:
    """The right probabilities (classes,) of an image of these raw bytes."""
    state = begin(image)
    for _ in range(evaluations):
        state = advance(state)
    return probabilities(state, classes)


class DrillTask:
    """A drill and its pool of `capacity` slots; see models.api.Task for the contract."""

    def __init__(self, info: ModelInfo, drill: Drill, capacity: int) -> None:
        self.info, self.drill, self.capacity = info, drill, capacity
        self.images, self.states = [b""] * capacity, [b""] * capacity
        self.done = [0] * capacity

    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Digest the images; UserError where one is not of the model's size."""
        return self._place(work, indices, slots, [(0, begin(work.images[i])) for i in indices])

    def restore(
        self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]
    ) -> Sequence[int]:
        """As `admit`, from saved states; ValueError where one is damaged."""
        return self._place(work, indices, slots, [self._read(state) for state in states])

    def _place(
        self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int], rows: Sequence[tuple[int, bytes]]
    ) -> Sequence[int]:
        size = math.prod(self.info.image)
        for i in indices:
            if len(work.images[i]) != size:
                raise UserError(f"image {i} has {len(work.images[i])} bytes, {self.info.name} takes {size}", "images")
        for i, slot, (done, state) in zip(indices, slots, rows, strict=True):
            self.images[slot], self.done[slot], self.states[slot] = work.images[i], done, state
        return [self.drill.evaluations - done for done, _ in rows]

    def _read(self, state: bytes) -> tuple[int, bytes]:
        done = int.from_bytes(state[:COUNT], "big")
        if len(state) != COUNT + DIGEST or done > self.drill.evaluations:
            raise ValueError(f"{self.info.name}: {len(state)} bytes after {done} evaluations are no state of a row")
        return done, state[COUNT:]

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        """Evaluations done and the digest after them."""
        return [self.done[slot].to_bytes(COUNT, "big") + self.states[slot] for slot in slots]

    def step(self, slots: Sequence[int]) -> StepStats:
        """Take `step_ms`, make the trouble that was asked for, digest every row once more."""
        if self.drill.step_ms:
            time.sleep(self.drill.step_ms / 1000 * math.ceil(len(slots) / (self.drill.batch or len(slots) or 1)))
        if self.drill.faults:
            self._trouble(slots)
        for slot in slots:
            self.states[slot] = advance(self.states[slot])
            self.done[slot] += 1
        return StepStats(rows=len(slots))

    def _trouble(self, slots: Sequence[int]) -> None:
        asked = {self.images[slot][0] for slot in slots}
        if Fault.HANG in asked:
            time.sleep(self.drill.hang_s)
        if Fault.EXIT in asked:
            os._exit(1)
        if Fault.KILL in asked:
            os.kill(os.getpid(), signal.SIGKILL)
        if Fault.MEMORY in asked and len(slots) > self.drill.most_rows:
            raise MemoryError(f"{len(slots)} rows, {self.drill.most_rows} fit")
        if Fault.RAISE in asked:
            raise RuntimeError("an image asked for this")

    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        """Exact answers of finished rows."""
        rows = [probabilities(self.states[slot], len(self.info.labels)) for slot in slots]
        return [ClassifiedRow(p, {"entropy": -sum(v * math.log(v) for v in p)}) for p in rows]

    def receipt(self, work: ClassifyWork, rows: Sequence[ClassifiedRow]) -> dict[str, Any]:
        """It ran nothing, at the price of `single`."""
        return {"method": work.method, "cost_vs_single": 1.0}

    def shift(self, work: ClassifyWork, slots: Sequence[int]) -> None:
        """Rows go on as they began."""

    def preview(self, slots: Sequence[int]) -> Sequence[None]:
        """Nothing to see."""
        return [None] * len(slots)


def load(folder: Path, slots: int, device: str, runtime: Runtime = Runtime()) -> DrillTask:
    """A drill folder as a Task with `slots` slots; StoreError names what is wrong with its config.json."""
    path = folder / "config.json"
    drill = Drill.read(path)
    info = ModelInfo(
        name=drill.name,
        task="classify",
        labels=drill.labels,
        image=drill.image,
        weights=sha256(path.read_bytes()).hexdigest(),
        description="Drill: answers digests of its images",
        backend="none",
        methods={"single": 1.0},
        calls={"single": max(1, drill.evaluations)},
        default_method="single",
    )
    return DrillTask(info, drill, slots)
