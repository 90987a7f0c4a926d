"""Checkpoints of the original repositories: DiT (facebookresearch/DiT) and U-ViT (baofff/U-ViT), as .pt files.

Shapes tell width, depth, patch and size of the network, but not the number of heads: published widths have known
ones, others need to be told. How the network was trained is not in the file either: DiT's is the linear schedule
with learned variance, U-ViT's the VP SDE for pixels and the scaled linear schedule, times 1 to 1000, for latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.api import UserError
from models.backbones.dit import sincos_2d
from models.importing.diffusers import labels, read_vae
from models.importing.folder import Imported
from models.importing.source import Source, rows_by_channel

Config = dict[str, Any]
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16}
LATENT_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a file does not say. `classes` is for tables of labels without a null label (U-ViT)."""

    heads: int | None = None
    classes: int | None = None
    vae: Path | None = None


def read_file(path: Path) -> Source:
    """The tensors of a .pt file, its EMA weights where it has several sets; nothing but tensors is unpickled."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training checkpoints hold their arguments
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own errors, RuntimeError, EOFError ...
        raise UserError(f"{path} cannot be read as a file of tensors: save the state dict alone ({error})") from None
    for key in ("ema", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise UserError(f"{path} holds no state dict, on its own or under `ema` or `model`")
    return Source({str(name).removeprefix("module."): value for name, value in data.items()}, str(path))


def read_dit(path: Path, told: Told) -> Imported:
    """An original DiT; guidance on the first three channels of latents, as its sampler has it."""
    source = read_file(path)
    width, channels, patch = _patches(source, "x_embedder.proj.weight")
    table = source.pop("pos_embed")[0].float()
    side = _side(source, len(table))
    if not torch.allclose(table, sincos_2d(width, side, "columns"), atol=1e-4):
        raise UserError(f"{path}: pos_embed is not the fixed table of DiT, which the backbone computes itself")
    out = source["final_layer.linear.weight"].shape[0] // patch**2
    network: Config = {
        "image_size": side * patch,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": source.count("blocks.{}.attn.qkv.weight"),
        "heads": _heads(source, width, told.heads),
        "classes": _classes(source, len(source["y_embedder.embedding_table.weight"]), None),
        "mlp_ratio": len(source["blocks.0.mlp.fc1.weight"]) // width,
        "time_features": source["t_embedder.mlp.0.weight"].shape[1],
        "time_scale": 1.0,
        "positions": "columns",
        "learned_variance": out == 2 * channels,
    }
    latent = channels == LATENT_CHANNELS
    variance = {"variance": "learned_range"} if network["learned_variance"] else {}
    return Imported(
        backbone="dit",
        network=network,
        process={
            "kind": "discrete",
            "timesteps": 1000,
            "betas": {"schedule": "linear", "start": 0.0001, "end": 0.02},
            "prediction": "epsilon",
            "learned_variance": network["learned_variance"],
            "grid": "linspace",
        },
        tensors=_dit_tensors(source, network),
        labels=labels(None, network["classes"]),
        gear={"solver": "ddpm", "steps": 250, "guidance": 4.0, "solver_options": variance},
        codec=_codec(source, channels, told.vae),
        guided_channels=3 if latent else None,
    )


def _dit_tensors(source: Source, network: Config) -> dict[str, Tensor]:
    source.take("embed.weight", "x_embedder.proj.weight", lambda w: w.flatten(1))
    source.take("embed.bias", "x_embedder.proj.bias")
    source.linear("time1", "t_embedder.mlp.0")
    source.linear("time2", "t_embedder.mlp.2")
    source.take("labels.weight", "y_embedder.embedding_table.weight")
    for block in range(network["depth"]):
        source.linear(f"modulation.{block}", f"blocks.{block}.adaLN_modulation.1")
        _attention_and_mlp(source, block, f"blocks.{block}")
    source.linear("head_modulation", "final_layer.adaLN_modulation.1")
    _head(source, "final_layer.linear", network["patch"])
    return source.finish()


def read_uvit(path: Path, told: Told) -> Imported:
    """An original U-ViT; its table of labels ends with the null label unless `told.classes` says otherwise."""
    source = read_file(path)
    width, channels, patch = _patches(source, "patch_embed.proj.weight")
    encoder = source.count("in_blocks.{}.norm1.weight")
    embedded = len(source["label_emb.weight"]) if "label_emb.weight" in source.tensors else 0
    classes = _classes(source, embedded, told.classes) if embedded else 0
    no_null = embedded and classes == embedded
    side = _side(source, source["pos_embed"].shape[1] - (2 if embedded else 1))
    latent = channels == LATENT_CHANNELS
    network: Config = {
        "image_size": side * patch,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": 2 * encoder + 1,
        "heads": _heads(source, width, told.heads),
        "classes": classes,
        "mlp_ratio": len(source["mid_block.mlp.fc1.weight"]) // width,
        "qkv_bias": "mid_block.attn.qkv.bias" in source.tensors,
        "time_mlp": "time_embed.0.weight" in source.tensors,
        "conv": "final_layer.weight" in source.tensors,
        "time_offset": 1.0 if latent else 0.0,
    }
    betas = {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012}
    discrete = {"kind": "discrete", "timesteps": 1000, "betas": betas, "prediction": "epsilon", "grid": "linspace"}
    guidance = 1.4 if latent and classes and not no_null else 1.0
    return Imported(
        backbone="uvit",
        network=network,
        process=discrete if latent else {"kind": "vpsde", "prediction": "epsilon"},
        tensors=_uvit_tensors(source, network, bool(no_null)),
        labels=labels(None, classes) if classes else ["image"],
        gear={"solver": "dpmpp_2m", "steps": 50, "guidance": guidance, "solver_options": {}},
        codec=_codec(source, channels, told.vae),
        guided_channels=0 if no_null or not classes else None,
        notes=["It has no null label, so guidance stays at 1."] if no_null else [],
    )


def _uvit_tensors(source: Source, network: Config, no_null: bool) -> dict[str, Tensor]:
    source.take("embed.weight", "patch_embed.proj.weight", lambda w: w.flatten(1))
    source.take("embed.bias", "patch_embed.proj.bias")
    source.take("positions", "pos_embed", lambda table: table[0])
    if network["time_mlp"]:
        source.linear("time.0", "time_embed.0")
        source.linear("time.2", "time_embed.2")
    if network["classes"]:
        zero_null = (lambda table: torch.cat([table, torch.zeros_like(table[:1])])) if no_null else None
        source.take("labels.weight", "label_emb.weight", zero_null)
    half = network["depth"] // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for block, theirs in enumerate(names):
        for norm in ("norm1", "norm2"):
            source.linear(f"blocks.{block}.{norm}", f"{theirs}.{norm}")
        if block > half:
            source.linear(f"blocks.{block}.skip", f"{theirs}.skip_linear")
        _attention_and_mlp(source, block, theirs, network["qkv_bias"])
    source.linear("head_norm", "norm")
    _head(source, "decoder_pred", network["patch"])
    if network["conv"]:
        source.linear("smooth", "final_layer")
    return source.finish()


def _attention_and_mlp(source: Source, block: int, theirs: str, qkv_bias: bool = True) -> None:
    layers = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for ours, layer in layers.items():
        if ours == "qkv" and not qkv_bias:
            source.take(f"blocks.{block}.qkv.weight", f"{theirs}.{layer}.weight")
        else:
            source.linear(f"blocks.{block}.{ours}", f"{theirs}.{layer}")


def _head(source: Source, theirs: str, patch: int) -> None:
    for kind in ("weight", "bias"):
        source.take(f"head.{kind}", f"{theirs}.{kind}", rows_by_channel(patch))


def _patches(source: Source, name: str) -> tuple[int, int, int]:
    """Width, channels and patch size from the weight of the patch embedding."""
    width, channels, patch, _ = source[name].shape
    return width, channels, patch


def _side(source: Source, tokens: int) -> int:
    side = isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"{source.where}: pos_embed has {tokens} patches, which is no square")
    return side


def _heads(source: Source, width: int, told: int | None) -> int:
    heads = told or HEADS.get(width)
    if heads is None or width % heads:
        raise UserError(f"{source.where}: width {width} does not say how many heads; give --heads")
    return heads


def _classes(source: Source, embedded: int, told: int | None) -> int:
    classes = embedded - 1 if told is None else told
    if classes not in (embedded, embedded - 1) or classes < 1:
        raise UserError(f"{source.where}: --classes {told} does not fit a table of {embedded} labels")
    return classes


def _codec(source: Source, channels: int, vae: Path | None) -> tuple[str, Config, Mapping[str, Tensor]] | None:
    if vae is not None:
        return ("autoencoder_kl", *read_vae(vae))
    if channels not in (1, 3):
        raise UserError(
            f"{source.where}: {channels} channels are latents; give --vae, a diffusers AutoencoderKL folder"
        )
    return None
