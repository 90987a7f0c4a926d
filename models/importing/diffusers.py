"""A local folder of a diffusers DiT pipeline (DiTTransformer2DModel, AutoencoderKL, a scheduler) to its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.api import UserError
from models.codecs.autoencoder_kl import NEEDED
from models.importing.folder import Imported
from models.importing.schedulers import read_scheduler
from models.importing.source import Source, read_safetensors, rows_by_channel
from models.store import read_json

Config = dict[str, Any]
GUIDANCE = 4.0  # of diffusers' DiTPipeline
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: DiT folders from before the first
NETWORK = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
ONLY = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "num_vector_embeds": None,
    "caption_channels": None,
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_pipeline(folder: Path) -> Imported:
    """Read every part of the pipeline.

    Raises:
        UserError: a missing or malformed file, or something that is not supported, by file and key.
    """
    index = _table(folder / "model_index.json")
    _component(folder, index, "transformer", TRANSFORMERS)
    network, tensors = read_transformer(folder / "transformer")
    settings = folder / "scheduler" / "scheduler_config.json"
    with _named(settings):
        process, gear = read_scheduler(_table(settings), network["learned_variance"])
    codec = None
    if index.get("vae") not in (None, [None, None]):
        _component(folder, index, "vae", ("AutoencoderKL",))
        codec = ("autoencoder_kl", *read_vae(folder / "vae"))
    return Imported(
        backbone="dit",
        network=network,
        process=process,
        tensors=tensors,
        labels=labels(index.get("id2label"), network["classes"]),
        gear={**gear, "guidance": GUIDANCE},
        codec=codec,
    )


def _table(path: Path) -> Config:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is no table")
    return value


def _component(folder: Path, index: Config, name: str, classes: tuple[str, ...]) -> None:
    """Refuse a pipeline whose part `name` is missing or of another class."""
    where = folder / "model_index.json"
    if name not in index:
        others = [f"{key} {value[1]}" for key, value in index.items() if isinstance(value, list) and len(value) == 2]
        raise UserError(f"{where}: no {name}; the pipeline has {', '.join(others) or 'no parts'}")
    pair = index[name]
    found = pair[1] if isinstance(pair, list) and len(pair) == 2 else pair
    if found not in classes:
        raise UserError(f"{where}: {name} {found} is not supported; supported: {classes[0]}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors get the file in front."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_transformer(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The `network` table of the backbone dit and its tensors."""
    path = folder / "config.json"
    config = _table(path)
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key}={config[key]} is not supported; supported: {value}")
    c = {**NETWORK, **{key: value for key, value in config.items() if key in NETWORK}}
    if c["out_channels"] not in (None, c["in_channels"], 2 * c["in_channels"]):
        raise UserError(f"{path}: out_channels={c['out_channels']} is neither in_channels nor twice as many")
    network = {
        "image_size": c["sample_size"],
        "channels": c["in_channels"],
        "patch": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "classes": c["num_embeds_ada_norm"],
        "mlp_ratio": 4,
        "time_features": 256,
        "time_scale": 1.0,
        "freq_shift": 1.0,
        "mlp_norm_eps": c["norm_eps"],
        "positions": "columns",
        "learned_variance": c["out_channels"] == 2 * c["in_channels"],
    }
    source = Source(read_safetensors(folder), str(folder))
    network["block_embedders"] = not embedders_agree(source, network["depth"])
    return network, dit_tensors(source, network)


def _embedder(block: int) -> dict[str, str]:
    """Our name to theirs, of the layers that embed time and label for a block."""
    theirs = f"transformer_blocks.{block}.norm1.emb"
    steps = {f"time{i}": f"{theirs}.timestep_embedder.linear_{i}" for i in (1, 2)}
    return {**steps, "labels": f"{theirs}.class_embedder.embedding_table"}


def embedders_agree(source: Source, depth: int) -> bool:
    """Whether all blocks embed time and label alike, as checkpoints converted from the original DiT do."""

    def same(theirs: str, kind: str, block: int) -> bool:
        other = theirs.replace("transformer_blocks.0.", f"transformer_blocks.{block}.")
        return torch.equal(source[f"{theirs}.{kind}"], source[f"{other}.{kind}"])

    kinds = {"time1": ("weight", "bias"), "time2": ("weight", "bias"), "labels": ("weight",)}
    names = [(theirs, kind) for ours, theirs in _embedder(0).items() for kind in kinds[ours]]
    return all(same(theirs, kind, block) for block in range(1, depth) for theirs, kind in names)


def dit_tensors(source: Source, network: Config) -> dict[str, Tensor]:
    """The transformer's tensors under the names of the backbone dit."""
    for block in range(network["depth"]):
        prefix = "" if block == 0 else f"embedders.{block - 1}."
        for ours, theirs in _embedder(block).items():
            if block and not network["block_embedders"]:
                for name in [name for name in source.tensors if name.startswith(f"{theirs}.")]:
                    source.pop(name)
            elif ours == "labels":
                source.take(f"{prefix}labels.weight", f"{theirs}.weight")
            else:
                source.linear(prefix + ours, theirs)
        b = f"transformer_blocks.{block}"
        source.linear(f"modulation.{block}", f"{b}.norm1.linear")
        source.linear(f"blocks.{block}.qkv", *(f"{b}.attn1.to_{x}" for x in "qkv"), bias=False)
        source.linear(f"blocks.{block}.proj", f"{b}.attn1.to_out.0")
        source.linear(f"blocks.{block}.fc1", f"{b}.ff.net.0.proj")
        source.linear(f"blocks.{block}.fc2", f"{b}.ff.net.2")
    source.take("embed.weight", "pos_embed.proj.weight", lambda w: w.flatten(1))
    source.take("embed.bias", "pos_embed.proj.bias")
    source.linear("head_modulation", "proj_out_1")
    for kind in ("weight", "bias"):
        source.take(f"head.{kind}", f"proj_out_2.{kind}", rows_by_channel(network["patch"]))
    source.tensors.pop("pos_embed.pos_embed", None)  # some versions store the fixed table
    return source.finish()


def read_vae(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The codec's config and the tensors of its decoder; the encoder is left behind."""
    path = folder / "config.json"
    config = _table(path)
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{path}: {config.get('_class_name')} is not supported; supported: AutoencoderKL")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise UserError(f"{path}: {key} is not supported; supported: null")
    tensors = {name: value for name, value in read_safetensors(folder).items() if name.startswith(NEEDED)}
    if not tensors:
        raise UserError(f"{folder}: the weights hold no decoder")
    return {k: v for k, v in config.items() if not k.startswith("_")}, {_renamed(k): v for k, v in tensors.items()}


def _renamed(name: str) -> str:
    """Attention layers of files from before diffusers 0.12 have other names."""
    *path, layer, kind = name.split(".")
    return ".".join([*path, OLD_ATTENTION.get(layer, layer), kind]) if "attentions" in path else name


def labels(id2label: Config | None, classes: int) -> list[str]:
    """One name for each class: the first of its synonyms, with the index where two classes share it."""
    named = {int(index): str(text).split(",")[0].strip() for index, text in (id2label or {}).items()}
    names = [named.get(index, f"class-{index}") for index in range(classes)]
    shared = {name for name in names if names.count(name) > 1}
    return [f"{name} ({index})" if name in shared else name for index, name in enumerate(names)]
