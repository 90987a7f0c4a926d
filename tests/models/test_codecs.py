"""Codecs: one contract for all, and AutoencoderKL against diffusers."""

import builtins

import pytest
import torch

from models.api import UserError
from models.codecs.autoencoder_kl import NEEDED
from models.registry import CODECS, resolve
from tests.models.pipelines import random_vae


def decoder_of(vae):
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return config, {name: value for name, value in vae.state_dict().items() if name.startswith(NEEDED)}


CASES = {
    "identity": (lambda: ({}, {}), (3, 8, 8), (3, 8, 8)),
    "autoencoder_kl": (lambda: decoder_of(random_vae()), (4, 8, 8), (3, 16, 16)),
}


@pytest.fixture(params=CODECS)
def case(request):
    parts, row_shape, image_shape = CASES[request.param]
    return resolve(CODECS, request.param)(*parts()), row_shape, image_shape


@torch.no_grad()
def test_pixels_have_the_promised_shape_and_range(case):
    codec, row_shape, image_shape = case
    assert codec.image_shape(row_shape) == image_shape
    pixels = codec.decode(5 * torch.randn(3, *row_shape))
    assert pixels.shape == (3, *image_shape)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1.0
    assert pixels.max() <= 1.0
    assert pixels.std() > 0.0


@torch.no_grad()
def test_a_row_decodes_alike_in_any_batch(case):
    codec, row_shape, _ = case
    states = torch.randn(5, *row_shape)
    together = codec.decode(states)
    for i in range(5):
        assert torch.equal(codec.decode(states[i : i + 1])[0], together[i])


def test_rows_that_do_not_fit_are_refused(case):
    codec, (channels, *sides), _ = case
    with pytest.raises(UserError, match=f"{channels + 3}"):
        codec.image_shape((channels + 3, *sides))


@pytest.mark.parametrize("changes", [{}, {"shift_factor": 0.1, "scaling_factor": 0.3}, {"use_post_quant_conv": False}])
@torch.no_grad()
def test_autoencoder_kl_decodes_as_diffusers_does(changes):
    vae = random_vae(**changes)
    codec = resolve(CODECS, "autoencoder_kl")(*decoder_of(vae))
    latents = torch.randn(2, 4, 8, 8)
    expected = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    torch.testing.assert_close(codec.decode(latents), expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert not any(name.startswith(("encoder", "quant")) for name in codec.state_dict())


def test_a_tensor_missing_from_the_decoder_is_named():
    config, tensors = decoder_of(random_vae())
    tensors.pop("decoder.conv_out.bias")
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias"):
        resolve(CODECS, "autoencoder_kl")(config, tensors)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return real(name, *rest)

    parts = decoder_of(random_vae())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"offramp\[latent\]"):
        resolve(CODECS, "autoencoder_kl")(*parts)


def test_identity_takes_nothing():
    with pytest.raises(UserError, match="scale"):
        resolve(CODECS, "identity")({"scale": 1}, {})
