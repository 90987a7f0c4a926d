"""Names to implementations, resolved on first use. Standard library only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

BACKBONES = {
    "dit": "models.backbones.dit:DiT",
    "uvit": "models.backbones.uvit:UViT",
    "resnet": "models.backbones.resnet:ResNet",
    "bridge": "models.backbones.bridge:BridgeNetwork",
}
SOLVERS = {
    "ddpm": "models.solvers.ddpm:trajectory",
    "ddim": "models.solvers.ddim:trajectory",
    "euler": "models.solvers.euler:trajectory",
    "euler_ancestral": "models.solvers.euler_ancestral:trajectory",
    "heun": "models.solvers.heun:trajectory",
    "dpmpp_2m": "models.solvers.dpmpp_2m:trajectory",
    "dpmpp_2m_sde": "models.solvers.dpmpp_2m_sde:trajectory",
    "unipc": "models.solvers.unipc:trajectory",
    "euler_maruyama": "models.solvers.euler_maruyama:trajectory",
}
EXITS = {
    "full": "models.exits.full:schedule",
    "ase": "models.exits.ase:schedule",
    "table": "models.exits.table:schedule",
}
CODECS = {
    "identity": "models.codecs.identity:load",
    "autoencoder_kl": "models.codecs.autoencoder_kl:load",
}
METHODS = {
    "single": "models.methods.single:Single",
    "bridge": "models.methods.bridge:Bridge",
    "bridges": "models.methods.bridges:Bridges",
    "bridge_network": "models.methods.bridge_network:CurveBridges",
    "distilled": "models.methods.distilled:Distilled",
    "exits": "models.methods.exits:Exits",
    "ensemble": "models.methods.ensemble:Ensemble",
    "cascade": "models.methods.cascade:Cascade",
}
BACKENDS = {
    "eager": "models.backends.eager:build",
    "compiled": "models.backends.compiled:build",
    "onnx": "models.backends.onnx:build",
    "cudagraph": "models.backends.cudagraph:build",
    "compiled_cudagraph": "models.backends.cudagraph:build_compiled",
    "auto": "models.backends.auto:build",
}
TASKS = {
    "generate": "models.tasks.generator:load",
    "classify": "models.tasks.classify:load",
    "drill": "models.tasks.drill:load",
}
DESCRIPTIONS = {
    "generate": "models.tasks.gears:described",
}
COMMANDS = {
    "train": "models.training.cli:app",
    "eval": "models.evaluation.cli:app",
    "import": "models.importing.cli:app",
    "profile": "models.evaluation.profile:app",
}


def resolve(table: dict[str, str], name: str) -> Any:
    """The object behind `name`; a KeyError lists the known names."""
    try:
        module, attribute = table[name].split(":")
    except KeyError:
        raise KeyError(f"unknown name {name!r}; known: {', '.join(sorted(table))}") from None
    return getattr(import_module(module), attribute)
