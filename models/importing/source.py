"""Foreign tensors, taken one by one under our names: what is missing or left over is an error, never a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.api import UserError
from models.store import read_json

WEIGHTS = "diffusion_pytorch_model"


class Source:
    """Tensors of a checkpoint by their names there, and those taken so far by their names here."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.tensors, self.where = dict(tensors), where
        self.taken: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.where}: no tensor {name}: not a checkpoint of this kind, or a part of one")
        return self.tensors[name]

    def pop(self, name: str) -> Tensor:
        """Take a tensor out."""
        value = self[name]
        del self.tensors[name]
        return value

    def take(self, ours: str, theirs: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Tensor `theirs` becomes `ours`."""
        value = self.pop(theirs)
        self.taken[ours] = value if change is None else change(value)

    def linear(self, ours: str, *theirs: str, bias: bool = True) -> None:
        """Weight and bias of a layer; of several, stacked. Without `bias` there may be none: zeros then."""
        weights = [self.pop(f"{name}.weight") for name in theirs]
        self.taken[f"{ours}.weight"] = torch.cat(weights)
        if bias or f"{theirs[0]}.bias" in self.tensors:
            self.taken[f"{ours}.bias"] = torch.cat([self.pop(f"{name}.bias") for name in theirs])
        else:
            self.taken[f"{ours}.bias"] = self.taken[f"{ours}.weight"].new_zeros(sum(len(w) for w in weights))

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1) ... there are."""
        n = 0
        while pattern.format(n) in self.tensors:
            n += 1
        if not n:
            self[pattern.format(0)]
        return n

    def finish(self) -> dict[str, Tensor]:
        """Everything taken; nothing may be left."""
        if self.tensors:
            names = sorted(self.tensors)
            raise UserError(f"{self.where}: {len(names)} tensors have no place in the network, the first is {names[0]}")
        return self.taken


def rows_by_channel(patch: int) -> Callable[[Tensor], Tensor]:
    """Reorder the rows of a head from (p, p, channel) to (channel, p, p); weight (p p c, D) or bias (p p c,)."""

    def change(value: Tensor) -> Tensor:
        rest = value.shape[1:]
        return value.view(patch, patch, -1, *rest).movedim(2, 0).reshape(-1, *rest)

    return change


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers model folder: one file, shards with an index, or one variant such as fp16."""
    from safetensors.torch import load_file

    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if (folder / f"{WEIGHTS}.safetensors").is_file():
        names = [f"{WEIGHTS}.safetensors"]
    elif index.is_file():
        names = sorted(set(_weight_map(index).values()))
    else:
        names = sorted(path.name for path in folder.glob(f"{WEIGHTS}.*.safetensors"))
        if len(names) != 1:
            raise UserError(_no_weights(folder, names))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is outside the folder")
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {index.name} lists it")
        try:
            tensors |= load_file(path)
        except Exception as error:  # SafetensorError has no public base
            raise UserError(f"{path} is not a safetensors file: {error}") from None
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    table: Any = read_json(index)
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        raise UserError(f"{index} has no `weight_map` table")
    return table["weight_map"]


def _no_weights(folder: Path, found: list[str]) -> str:
    if found:
        return f"{folder} has several variants ({', '.join(found)}): keep one"
    if list(folder.glob("*.bin")):
        return (
            f"{folder} holds pickled weights (.bin), which are not read: load the pipeline in diffusers and "
            "save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder} has no {WEIGHTS}.safetensors"
