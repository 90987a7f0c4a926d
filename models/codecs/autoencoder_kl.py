"""Latent models: the decoder of diffusers' AutoencoderKL (Rombach et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.api import UserError
from models.codecs.interface import Codec, Shape

NEEDED = ("decoder.", "post_quant_conv.")


class AutoencoderKL(Codec):
    """Decoder and its first 1x1 convolution; pixels = decode(states / scaling_factor + shift_factor)."""

    def __init__(self, decoder: nn.Module, post_quant_conv: nn.Module | None, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = decoder, post_quant_conv
        self.channels, self.latent_channels = int(config["out_channels"]), int(config["latent_channels"])
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.scale, self.shift = float(config["scaling_factor"]), float(config["shift_factor"] or 0.0)

    def image_shape(self, row_shape: Shape) -> Shape:
        """See Codec."""
        channels, height, width = row_shape
        if channels != self.latent_channels:
            raise UserError(f"the codec decodes {self.latent_channels} latent channels, the network has {channels}")
        return self.channels, height * self.factor, width * self.factor

    def decode(self, states: Tensor) -> Tensor:
        """See Codec. On a CPU one by one: convolutions give a row other bits at other batch sizes."""
        groups = states.split(1) if states.device.type == "cpu" else [states]
        return torch.cat([self._decode(group) for group in groups])

    def _decode(self, states: Tensor) -> Tensor:
        latents = states / self.scale + self.shift
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: Tensor = self.decoder(latents)
        return pixels.clamp(-1.0, 1.0)


def load(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    """Build from a diffusers AutoencoderKL config and the tensors of its decoder.

    Raises:
        UserError: diffusers is missing, or config and tensors do not fit each other.
    """
    try:
        from diffusers import AutoencoderKL as Source
    except ModuleNotFoundError as error:
        raise UserError(f"codec autoencoder_kl needs {error.name}: pip install 'offramp[latent]'") from None
    with torch.device("meta"):
        source = Source.from_config(dict(config))
    codec = AutoencoderKL(source.decoder, source.post_quant_conv, source.config)
    try:
        codec.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"codec: tensors do not fit its config: {error}") from None
    return codec.eval().requires_grad_(False)
