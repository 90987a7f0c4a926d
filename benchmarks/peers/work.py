"""The jobs that every peer does, around the model code that Offramp serves: requests in a list, answers in a list.

What a peer's app needs to know comes from its environment (`Setup`). A batch runs to its end as request-level batching
has it: all of its answers leave together. Within a batch a row that needs no more evaluations is not computed any
further, so that requests of mixed length waste nothing but waiting: no batch of one number of steps, and none that
computes finished rows on, could be cheaper. Depth is full throughout.

    noop      the request is the answer
    sleep     20 ms a batch, whatever its size, then a digest of the picture's bytes (models.tasks.drill)
    generate  one picture of fashion-dit, gear `full`: dpmpp_2m, guidance 2, as many steps as asked for
    mixed     the same; the requests ask for 10 to 50 steps
    classify  one picture by fashion-ensemble, method `ensemble`, calibrated, with its uncertainty
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Job = Callable[[Sequence[Json]], list[Json]]
ENSEMBLE, GENERATOR = "fashion-ensemble", "fashion-dit"
SLEEP_MS, CLASSES = 20.0, 10
PREFIX = "PEERS_"


@dataclass(frozen=True)
class Setup:
    """What an app is told.

    Attributes:
        work: name of the job.
        port: where to listen, on the loopback.
        batch: most requests in a batch; `wait_ms` the longest that the first of them waits for others.
        timeout_s: after this long nobody wants the answer any more.
        note: file in which the process that runs the model writes its process id.
    """

    work: str
    port: int
    batch: int
    wait_ms: float
    timeout_s: float
    note: str

    def environment(self) -> dict[str, str]:
        """The variables that `read` reads."""
        return {PREFIX + name.upper(): str(value) for name, value in asdict(self).items()}

    @classmethod
    def read(cls) -> Setup:
        """What `environment` gave."""
        kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
        return cls(**{f.name: kinds[str(f.type)](os.environ[PREFIX + f.name.upper()]) for f in fields(cls)})


def load(setup: Setup) -> Job:
    """The job, ready, in the process that calls; its process id is noted once it is warm."""
    job = {"noop": noop, "sleep": sleep}.get(setup.work) or MODELS[setup.work](setup.batch)
    Path(setup.note).write_text(str(os.getpid()))
    return job


def noop(requests: Sequence[Json]) -> list[Json]:
    """Each request, as it came."""
    return list(requests)


def sleep(requests: Sequence[Json]) -> list[Json]:
    """A model that takes 20 ms a batch; the picture is not decoded, which Offramp's gateway does."""
    from models.tasks import drill

    time.sleep(SLEEP_MS / 1000)
    return [{"probabilities": drill.answer(base64.b64decode(r["image"]), 1, CLASSES)} for r in requests]


def run(task: Any, works: Sequence[Any]) -> list[Any]:
    """A static batch of one-image works to its end; rows that have no evaluation to come are left out."""
    slots = list(range(len(works)))
    left = [task.admit(work, [0], [slot])[0] for slot, work in zip(slots, works, strict=True)]
    while active := [slot for slot in slots if left[slot]]:
        stats = task.step(active)
        for slot in active:
            left[slot] = 0 if slot in stats.finished else left[slot] - (slot not in stats.waiting)
    return list(task.collect(slots))


def generator(batch: int) -> Job:
    """Draw pictures."""
    from PIL import Image

    from models.api import GenerateWork
    from models.store import ZOO
    from models.tasks.generator import load as load_generator

    one_thread()
    task = load_generator(ZOO / GENERATOR, batch, "cpu")
    gear = next(gear for gear in task.info.gears if gear.name == "full")

    def work(request: Json) -> GenerateWork:
        return GenerateWork(
            model=GENERATOR,
            labels=(request["label"],),
            seeds=(request["seed"],),
            steps=request["steps"],
            solver=gear.solver,
            guidance=gear.guidance,
            gear=gear.name,
        )

    def png(pixels: Any) -> str:
        buffer = io.BytesIO()
        Image.fromarray(pixels[:, :, 0]).save(buffer, "png")
        return base64.b64encode(buffer.getvalue()).decode()

    def draw(requests: Sequence[Json]) -> list[Json]:
        rows = run(task, [work(request) for request in requests])
        return [{"b64": png(row.pixels), "seed": row.seed} for row in rows]

    draw([{"label": 0, "seed": 0, "steps": 2}] * batch)
    return draw


def classifier(batch: int) -> Job:
    """Classify pictures by all members."""
    from PIL import Image

    from models.api import ClassifyWork
    from models.store import ZOO
    from models.tasks.classify import load as load_classifier

    one_thread()
    task = load_classifier(ZOO / ENSEMBLE, batch, "cpu")

    def work(request: Json) -> ClassifyWork:
        picture = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("L")
        return ClassifyWork(model=ENSEMBLE, images=(picture.tobytes(),), method="ensemble", top_k=3)

    def classify(requests: Sequence[Json]) -> list[Json]:
        rows = run(task, [work(request) for request in requests])
        return [{"probabilities": row.probabilities, "uncertainty": row.uncertainty} for row in rows]

    blank = io.BytesIO()
    Image.new("L", (28, 28)).save(blank, "png")
    classify([{"image": base64.b64encode(blank.getvalue()).decode()}] * batch)
    return classify


def one_thread() -> None:
    """As Offramp's worker with OFFRAMP_THREADS=1."""
    import torch

    torch.set_num_threads(1)


MODELS: dict[str, Callable[[int], Job]] = {"generate": generator, "mixed": generator, "classify": classifier}
