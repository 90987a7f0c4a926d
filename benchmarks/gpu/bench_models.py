"""The models that the GPU benchmarks run: folders, or random weights at the size of CIFAR-10, and their FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from models.api import Runtime
from models.backbones.dit import DiT, DiTConfig
from models.backbones.interface import Backbone
from models.backbones.uvit import UViT, UViTConfig
from models.backends.cudagraph import Captured, Run, record
from models.backends.interface import Backend, Setup
from models.registry import BACKENDS
from models.store import ZOO, write_model
from models.tasks.gears import write_gears
from models.tasks.generate import GenerateTask
from models.tasks.generator import load, load_model, macs_at

CLASSES = 10
SHARES = (1.0, 0.875, 0.75, 0.625, 0.375)  # of the full depth, by time: fashion-dit's `balanced`
EDGES = (0.1, 0.4, 0.6, 0.9, 1.0)
ECO = (0.875, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True)
class Subject:
    """A generator's folder and what its network costs.

    Attributes:
        flops: by depth, of one network row: linear and convolution layers, and attention.
    """

    name: str
    folder: Path
    parameters: int
    tokens: int
    flops: dict[int, float]
    random: bool = False

    def load(self, slots: int, device: str, backend: str, precision: str, cache: Path, budget_s: float) -> GenerateTask:
        """As a worker would."""
        return load(self.folder, slots, device, Runtime(backend, budget_s, str(cache), True, precision))


def subject(folder: Path, random: bool = False) -> Subject:
    """Read a folder and count."""
    model, config, _ = load_model(folder)
    hidden = model.enter(torch.zeros(1, *model.row_shape), model.condition(torch.zeros(1), torch.zeros(1).long()))[0]
    tokens, width = hidden.shape[1:]
    depths = range(max(1, model.always), model.depth + 1)
    flops = {depth: 2.0 * macs_at(model, depth) + 4.0 * tokens**2 * width * depth for depth in depths}
    parameters = sum(p.numel() for p in model.parameters())
    return Subject(str(config["name"]), folder, parameters, int(tokens), flops, random)


def subjects(folders: Sequence[Path], scratch: Path, toy: bool) -> list[Subject]:
    """The named folders, or else random weights; then fashion-dit. Most important first."""
    given = [subject(folder) for folder in folders]
    made = [] if given else [subject(write_random(kind, scratch, toy), random=True) for kind in ("dit", "uvit")]
    shipped = [] if toy else [subject(ZOO / "fashion-dit")]
    return [*(given or made[:1]), *shipped, *made[1:]]


def random_network(kind: str, toy: bool) -> tuple[Backbone, dict[str, object]]:
    """About 10 M parameters, patch 2; every weight random, zeros of the initialisation too: zeros can run faster."""
    torch.manual_seed(0)
    shape: dict[str, object] = {
        **{"image_size": 8 if toy else 32, "channels": 3, "patch": 4 if toy else 2, "classes": CLASSES},
        **{"width": 32 if toy else 256, "heads": 2 if toy else 4},
    }
    if kind == "dit":
        shape |= {"depth": 4 if toy else 8, "time_features": 32 if toy else 256}
        model: Backbone = DiT(DiTConfig(**shape))  # type: ignore[arg-type]
    else:
        shape |= {"depth": 5 if toy else 13}
        model = UViT(UViTConfig(**shape))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model, shape


def write_random(kind: str, scratch: Path, toy: bool) -> Path:
    """A folder of random weights with gears full, balanced and eco."""
    model, network = random_network(kind, toy)
    folder = scratch / f"random-{kind}"
    config = {
        **{"kind": "generator", "name": folder.name, "backbone": kind, "network": network},
        **{"process": {"prediction": "v", "clip": 1.0}, "labels": [str(i) for i in range(CLASSES)]},
    }
    write_model(folder, config, {"model.safetensors": model.state_dict()})
    least = max(1, model.always)

    def depths(shares: Sequence[float]) -> list[int]:
        return [max(least, round(share * model.depth)) for share in shares]

    common = {"solver": "dpmpp_2m", "steps": 20, "guidance": 2.0}
    schedules = {
        "full": {"edges": [1.0], "depths": [model.depth]},
        "balanced": {"edges": list(EDGES), "depths": depths(SHARES)},
        "eco": {"edges": list(EDGES), "depths": depths(ECO)},
    }
    gears = [{"name": name, "schedule": {**one, "weights": ""}, **common} for name, one in schedules.items()]
    write_gears(folder, gears, "balanced")
    return folder


@contextmanager
def stand_in(wanted: bool) -> Iterator[None]:
    """While it lasts, backend `cudagraph` runs what it would have captured: its bookkeeping, on a CPU."""
    before = BACKENDS["cudagraph"]
    if wanted:
        BACKENDS["cudagraph"] = f"{__name__}:uncaptured"
    try:
        yield
    finally:
        BACKENDS["cudagraph"] = before


def uncaptured(setup: Setup) -> Backend:
    """The backend with graphs that are functions, run again into the same outputs."""

    def capture(run: Run) -> Captured:
        outputs = run()

        def replay() -> None:
            for fixed, value in zip(outputs, run(), strict=True):
                fixed.copy_(value)

        return replay, outputs

    return record(setup, capture)
