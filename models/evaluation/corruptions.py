"""Corrupted copies of uint8 images at severities 1 to 5, made by code from a seed (no data set to ship).

After the kinds of Hendrycks and Dietterich (ICLR 2019); the strengths are our own, for pictures of 28 to 32 pixels,
so that numbers compare between our methods and not with published tables.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.api import UserError

Images = NDArray[np.uint8]
BLUR = (0.5, 0.75, 1.0, 1.5, 2.0)  # standard deviation, pixels
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation, of a range of 1
ROTATION = (7.5, 15.0, 22.5, 30.0, 45.0)  # degrees, either way


def blur(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Gaussian blur, edges repeated."""
    sigma = BLUR[severity - 1]
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    x = images.astype(np.float32)
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded, n = np.pad(x, pad, mode="edge"), images.shape[axis]
        x = np.zeros_like(x)
        for shift, weight in enumerate(kernel / kernel.sum()):
            x += np.float32(weight) * np.take(padded, np.arange(shift, shift + n), axis)
    return np.rint(x).clip(0, 255).astype(np.uint8)


def noise(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Gaussian noise, independent in every pixel and channel, clipped to the range."""
    drawn = rng.standard_normal(images.shape, dtype=np.float32) * (255.0 * NOISE[severity - 1])
    return np.rint(images + drawn).clip(0, 255).astype(np.uint8)


def rotation(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Rotation about the centre, each image left or right at random, bilinear, black outside."""
    signs = np.where(rng.random(len(images)) < 0.5, -1.0, 1.0)
    turned = np.empty_like(images)
    for i, (image, sign) in enumerate(zip(images, signs, strict=True)):
        for c in range(images.shape[3]):
            plane = Image.fromarray(np.ascontiguousarray(image[:, :, c]))
            turned[i, :, :, c] = np.asarray(plane.rotate(sign * ROTATION[severity - 1], Image.Resampling.BILINEAR))
    return turned


CORRUPTIONS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "blur": blur,
    "noise": noise,
    "rotation": rotation,
}
SEVERITIES = range(1, 6)


def corrupt(images: Images, kind: str, severity: int, seed: int = 0) -> Images:
    """A corrupted copy of uint8 images (N, H, W, C); same shape.

    Image i depends on the images' shape, i and `seed` alone: the first n images of a batch come out the same
    whatever follows them.

    Raises:
        UserError: an unknown kind or severity, or images that are not uint8 (N, H, W, C).
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        known = f"{', '.join(CORRUPTIONS)} at severities 1 to 5"
        raise UserError(f"no corruption {kind!r} at severity {severity}; known: {known}")
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"corruptions need uint8 images (N, H, W, C), got {images.dtype} {images.shape}")
    rng = np.random.default_rng([seed, severity, list(CORRUPTIONS).index(kind)])
    return CORRUPTIONS[kind](images, severity, rng)
