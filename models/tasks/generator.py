"""A generator's folder as a Task: network, process, codec, gears, backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.api import ModelInfo, Runtime
from models.backbones.interface import Backbone
from models.backbones.macs import count_macs
from models.backends.interface import CONDITION_BLOCK, Setup
from models.backends.precision import at_precision, choose
from models.exits.plan import check
from models.registry import BACKBONES, BACKENDS, CODECS, resolve
from models.solvers.process import from_config, solvers_for
from models.store import StoreError, read_config, read_tensors, weights_digest
from models.tasks.decoding import DecodeStage
from models.tasks.device import pick_device, side_stream_copy
from models.tasks.gears import read_gears
from models.tasks.generate import GenerateTask

NETWORK = "model.safetensors"


def load_model(folder: Path) -> tuple[Backbone, dict[str, Any], str]:
    """The network of a generator folder (eval mode, float32), its config and weights digest."""
    config = read_config(folder, "generator")
    try:
        model: Backbone = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder}/config.json: backbone or network: {error}") from None
    model.load_state_dict(read_tensors(folder, NETWORK, config["files"]))
    return model.eval().requires_grad_(False), config, weights_digest(config["files"])


def load(folder: Path, slots: int, device: str, runtime: Runtime = Runtime()) -> GenerateTask:
    """A generator folder as a Task with `slots` slots."""
    model, config, weights = load_model(folder)
    gears, default = read_gears(folder, model.depth)
    for gear in gears:
        check(gear, weights, model.depth, runtime.force_schedules, max(1, model.always))
    where = pick_device(device)
    precision = choose(runtime.precision, str(config.get("precision", "fp32")), where)
    process = from_config(config["process"])
    decoding = load_decoding(folder, config, model, slots, where)
    channels, height, width = decoding.codec.image_shape(model.row_shape) if decoding else model.row_shape
    depths = sorted({depth for gear in gears for depth in gear.schedule.depths} | {model.depth})
    macs = {depth: macs_at(model, depth) for depth in depths} if model.bypasses else None
    network = at_precision(model.to(where), precision)
    setup = Setup(
        backbone=network,
        weights=weights,
        depths=tuple(depths),
        rows=max(2 * slots, CONDITION_BLOCK),
        device=where,
        cache=Path(runtime.cache),
        budget_s=runtime.budget_s,
        precision=precision,
    )
    backend = resolve(BACKENDS, runtime.backend)(setup)
    info = ModelInfo(
        name=str(config["name"]),
        task="generate",
        labels=tuple(config["labels"]),
        image=(height, width, channels),
        weights=weights,
        description=str(config.get("description", "")),
        backend=backend.note if precision == "fp32" else f"{precision}: {backend.note}",
        depth=model.depth,
        solvers=solvers_for(process),
        gears=gears,
        default_gear=default,
    )
    return GenerateTask(
        info,
        network,
        process,
        slots,
        where,
        backend=backend,
        decoding=decoding,
        guided_channels=config.get("guided_channels"),
        macs=macs,
    )


def load_decoding(
    folder: Path, config: dict[str, Any], model: Backbone, slots: int, device: torch.device
) -> DecodeStage | None:
    """The codec's stage of a latent model; None where states are pixels."""
    if "codec" not in config:
        return None
    table = config["codec"]
    tensors = read_tensors(folder, table["file"], config["files"])
    codec = resolve(CODECS, table["name"])(table["config"], {k: v.to(device) for k, v in tensors.items()})
    if device.type != "cuda":
        return DecodeStage(codec, slots, model.row_shape)
    return DecodeStage(codec, slots, model.row_shape, alone=8, copy=side_stream_copy(device))


@torch.no_grad()
def macs_at(model: Backbone, depth: int) -> int:
    """Conv + linear MACs of one row at `depth`, bypasses included."""
    condition = model.condition(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return count_macs(model, lambda: model(torch.zeros(1, *model.row_shape), condition, [depth]))
