"""Names to implementations, resolved on first use. Standard library only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

BACKBONES = {
    "dit": "models.backbones.dit:DiT",
    "resnet": "models.backbones.resnet:ResNet",
    "bridge": "models.backbones.bridge:BridgeNetwork",
}
SOLVERS = {
    "ddpm": "models.solvers.ddpm:coefficients",
    "ddim": "models.solvers.ddim:coefficients",
    "dpmpp_2m": "models.solvers.dpmpp_2m:coefficients",
}
METHODS = {
    "single": "models.tasks.methods:Single",
    "bridge": "models.tasks.methods:Bridge",
    "ensemble": "models.tasks.methods:Ensemble",
}
TASKS = {
    "generate": "models.tasks.generate:load",
    "classify": "models.tasks.classify:load",
}
COMMANDS = {
    "train": "models.training.cli:app",
    "eval": "models.evaluation.cli:app",
}


def resolve(table: dict[str, str], name: str) -> Any:
    """The object behind `name`; a KeyError lists the known names."""
    try:
        module, attribute = table[name].split(":")
    except KeyError:
        raise KeyError(f"unknown name {name!r}; known: {', '.join(sorted(table))}") from None
    return getattr(import_module(module), attribute)
