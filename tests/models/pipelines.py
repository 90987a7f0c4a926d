"""Small diffusers pipelines of random weights, written by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

CLASSES = 5
SIZE = 8


def random_transformer(**changes: Any) -> DiTTransformer2DModel:
    """Two blocks of width 32, every parameter random, output of about unit size."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        **{"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2},
        **{"sample_size": SIZE, "patch_size": 2, "num_embeds_ada_norm": CLASSES},
    }
    model = DiTTransformer2DModel(**(shape | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_vae(**changes: Any) -> AutoencoderKL:
    """Latents of 4 x 8 x 8 to pictures of 3 x 16 x 16."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        **{"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 2 * SIZE},
        **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    }
    return AutoencoderKL(**(shape | changes)).eval().requires_grad_(False)


def save(folder: Path, transformer: Any = None, scheduler: Any = None, vae: Any = None, **more: Any) -> Path:
    """A pipeline folder; DDIM without clipping unless told."""
    DiTPipeline(
        transformer=transformer or random_transformer(),
        vae=vae or random_vae(),
        scheduler=scheduler or DDIMScheduler(clip_sample=False),
        id2label=more.pop("id2label", None),
    ).save_pretrained(folder, **more)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
