"""Adversarial purification: noise an image a little, denoise it in a few steps, classify what comes out.

Yoon, Hwang, Lee, "Adversarial Purification with Score-based Generative Models" (ICML 2021), with a diffusion model
in the place of their score network. x_u = alpha x + sigma z; then DDIM without noise (Song et al., ICLR 2021) from u
to 0 in equal steps of u. One step is Tweedie's estimate E[x_0 | x_u]. `draws` noises are purified apart, and the
probabilities of their classifications averaged (section 4 of the paper).

The noise is a function of the image's bytes, so that an answer is one too. It is no secret: who knows the weights can
compute it, and search offline for bytes whose noise suits them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models.api import MAX_DRAWS, ExitSchedule, UserError
from models.backbones.interface import Backbone
from models.exits.plan import check, plan
from models.solvers.base import DATA, Point
from models.solvers.noise import normal
from models.solvers.process import from_config
from models.solvers.vp import Continuous
from models.store import StoreError
from models.tasks.gears import read_gears
from models.tasks.generator import load_model, macs_at

FURTHEST = 0.5  # diffusion time beyond which there is more noise than image, and the label goes with it
MOST_STEPS = 3


@dataclass(frozen=True)
class Dose:
    """How much to purify: diffusion time `u` reached, denoising `steps`, and `draws` of noise averaged over."""

    u: float = 0.3
    steps: int = 1
    draws: int = 4

    def __post_init__(self) -> None:
        if not 0.0 < self.u <= FURTHEST:
            raise UserError(f"purify: u must be above 0 and at most {FURTHEST}, got {self.u}", "purify")
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"purify: steps must be from 1 to {MOST_STEPS}, got {self.steps}", "purify")
        if not 1 <= self.draws <= MAX_DRAWS:
            raise UserError(f"purify: draws must be from 1 to {MAX_DRAWS}, got {self.draws}", "purify")


def image_keys(images: Iterable[bytes]) -> Tensor:
    """Seeds of the noise (N,) int64 in [0, 2^53), from digests of the images' bytes."""
    heads = (hashlib.blake2b(image, digest_size=8, person=b"purify").digest() for image in images)
    return torch.tensor([int.from_bytes(head, "big") >> 11 for head in heads], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Purifier:
    """A pixel diffusion model at one dose. Differentiable in the pixels; inputs lie on the model's device.

    Attributes:
        model: unconditional by its null label; states are pixels scaled to [-1, 1].
        dose: one for all rows; doses that differ need purifiers of their own, which may share `model`.
        schedule: blocks of the network by diffusion time.
    """

    model: Backbone
    process: Continuous
    dose: Dose
    schedule: ExitSchedule

    @classmethod
    def load(cls, folder: Path, image: Sequence[int], dose: Dose = Dose(), gear: str = "full") -> Purifier:
        """The generator in `folder`, on the CPU, for images (H, W, C), with the exit schedule of a gear.

        Raises:
            StoreError: it is not a pixel model of that shape, its process is not variance preserving in continuous
                time, or it has no such gear.
        """
        model, config, weights = load_model(folder)
        height, width, channels = image
        if "codec" in config or model.learned_variance or model.row_shape != (channels, height, width):
            raise StoreError(
                f"{folder} makes states {model.row_shape}; purification needs a pixel model of images "
                f"{(channels, height, width)}: train one on the classifier's images"
            )
        process = from_config(config["process"])
        if not isinstance(process, Continuous):
            raise StoreError(f"{folder}/config.json: process {process.kind} cannot purify; cosine and vpsde can")
        gears = {found.name: found for found in read_gears(folder, model.depth)[0]}
        if gear not in gears:
            raise StoreError(f"{folder}/gears.json has no gear {gear!r}; it has {', '.join(gears)}")
        check(gears[gear], weights, model.depth, shallowest=max(1, model.always))
        return cls(model, process, dose, gears[gear].schedule)

    @property
    def calls(self) -> int:
        """Network calls of a row, each on `draws` network rows."""
        return self.dose.steps

    @cached_property
    def points(self) -> list[Point]:
        """Where the steps start, from u down, and the data that the last one ends at."""
        steps = self.dose.steps
        return [*(self.process.at(self.dose.u * (1.0 - i / steps)) for i in range(steps)), DATA]

    @cached_property
    def depths(self) -> list[int]:
        """Blocks run at each step."""
        return plan(self.schedule, [p.u for p in self.points[:-1]])

    def cost(self, single_macs: int) -> float:
        """Conv + linear MACs of purifying one image, relative to `single_macs`; `draws` classifications come on top."""
        return self.dose.draws * sum(macs_at(self.model, depth) for depth in self.depths) / single_macs

    def begin(self, pixels: Tensor, keys: Tensor) -> Tensor:
        """Noised states: pixels (N, C, H, W) in [0, 1], keys (N,) int64 -> (N, draws, C, H, W)."""
        draws, first = self.dose.draws, self.points[0]
        seeds = keys.repeat_interleave(draws)
        noise = normal(seeds, torch.arange(draws, device=keys.device).repeat(len(keys)), tuple(pixels.shape[1:]))
        return first.alpha * (2.0 * pixels - 1.0)[:, None] + first.sigma * noise.unflatten(0, (len(keys), draws))

    def step(self, state: Tensor, n: Sequence[int]) -> Tensor:
        """One network call: states (N, draws, C, H, W), of which row i has made n[i] of its `calls`; the same shape.

        Rows at any n share the call. A row's result does not depend on the others, to rounding.
        """
        draws = state.shape[1]
        order = sorted(range(len(n)), key=lambda i: -self.depths[n[i]])
        at = torch.tensor([n[i] for i in order], device=state.device).repeat_interleave(draws)
        x = state[order].flatten(0, 1)
        depths = [self.depths[n[i]] for i in order for _ in range(draws)]
        out, _ = self.model(x, self._conditions[at], depths)
        c_x, c_o, clip, a_m, a_x, a_o = self._coefficients[at][:, :, None, None, None].unbind(1)
        moved = a_m * (c_x * x + c_o * out).clamp(-clip, clip) + a_x * x + a_o * out
        back = torch.argsort(torch.tensor(order, device=state.device))
        return moved.unflatten(0, (len(n), draws))[back]

    def finish(self, state: Tensor) -> Tensor:
        """Purified pixels (N, draws, C, H, W) in [0, 1] of rows that made all their calls."""
        return (0.5 * state + 0.5).clamp(0.0, 1.0)

    def __call__(self, pixels: Tensor, keys: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], keys (N,) -> purified pixels (N, draws, C, H, W), all steps at once."""
        state = self.begin(pixels, keys)
        for n in range(self.calls):
            state = self.step(state, [n] * len(state))
        return self.finish(state)

    @cached_property
    def _conditions(self) -> Tensor:
        """The network's one-token work of every step (steps, M): the same bits for every row, whatever its batch."""
        device = next(self.model.parameters()).device
        t = torch.tensor([p.t for p in self.points[:-1]], device=device)
        with torch.no_grad():
            return self.model.condition(t, torch.full(t.shape, self.model.null_label, device=device))

    @cached_property
    def _coefficients(self) -> Tensor:
        """(c_x, c_o, clip, a_m, a_x, a_o) of every step: x' = a_m clip(c_x x + c_o o) + a_x x + a_o o."""
        rows = []
        for here, there in zip(self.points[:-1], self.points[1:], strict=True):
            denoise, (n_x, n_o) = self.process.denoise(here), self.process.noise(here)
            noise = [there.alpha, there.sigma * n_x, there.sigma * n_o]
            rows.append([denoise["c_x"], denoise["c_o"], denoise["clip"], *noise])
        return torch.tensor(rows, device=next(self.model.parameters()).device)
