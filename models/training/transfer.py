"""The transfer set: what bridges and students learn from, made once and used by all.

Members agree on images they were trained on, so little is to be learned there (Nam et al., NeurIPS 2021); a row can be
an image that they were trained on, one that they were not, or one of our own generator's, shifted, mixed up with
another (Zhang et al., ICLR 2018), or pushed to where members disagree by output diversified sampling (ODS: Tashiro et
al., NeurIPS 2020). No labels are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.api import GenerateWork
from models.backbones.resnet import ResNet
from models.store import read_config, weights_digest
from models.tasks.classifier import to_pixels
from models.tasks.generator import load
from models.training.data import Images
from models.training.members import augment
from models.training.recipe import RecipeError

CHUNK = 1000
FIRST_SEED = 10_000_000  # far from the seeds that evaluations draw


@dataclass(frozen=True)
class Transfer:
    """Rows of a transfer set and where they come from.

    `seen`, `held_out`, `generated`: shares of `rows`, by the members' own training images, the other training images,
    and images that `generator` draws (unguided, `steps` steps of its default gear; `pool` different ones). Rows are
    shifted by up to `shift` pixels and, with `flip`, mirrored at random. A share `mixup_share` is mixed up with
    Beta(`mixup_alpha`) weights; a share `ods_share` moves by `ods_size` (root mean square over pixels) along the
    gradient of a random member's random mix of probabilities.
    """

    rows: int = 150_000
    seen: float = 0.0
    held_out: float = 1.0
    generated: float = 0.0
    generator: str = ""
    pool: int = 16_000
    steps: int = 15
    shift: int = 2
    flip: bool = False
    mixup_share: float = 0.5
    mixup_alpha: float = 0.4
    ods_share: float = 0.0
    ods_size: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Cache:
    """Pixels (N, C, H, W), taps of the source (N, C', H', W') and its features (N, F) in float16, every member's
    logits (N, M, K) in float32."""

    pixels: Tensor
    taps: Tensor
    features: Tensor
    logits: Tensor


def mixed_up(x: Tensor, share: float, alpha: float) -> Tensor:
    """A share of the images (N, C, H, W) mixed with another, weights from Beta(alpha, alpha)."""
    n = len(x)
    weight = torch.distributions.Beta(alpha, alpha).sample((n,))
    weight = torch.where(torch.rand(n) < share, weight, torch.ones(n))[:, None, None, None]
    return weight * x + (1 - weight) * x[torch.randperm(n)]


def diversified(x: Tensor, member: ResNet, size: float) -> Tensor:
    """ODS: x (N, C, H, W) moved by `size` (RMS) along the gradient of w . softmax(member(x)), w uniform in [-1, 1]."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        p = member(x).softmax(-1)
        (slope,) = torch.autograd.grad((p * (2 * torch.rand_like(p) - 1)).sum(), x)
    flat = slope.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30) * flat.shape[1] ** 0.5
    return (x.detach() + size * unit.view_as(x)).clamp(0, 1)


def drawn(folder: Path, n: int, steps: int, seed: int, path: Path) -> Images:
    """`n` unguided images of a generator's default gear, labels in turn, kept at `path`."""
    if path.is_file():
        kept: Images = load_file(path)["images"].numpy()
        return kept
    task = load(folder, 50, "cpu")
    gear = next(g for g in task.info.gears if g.name == task.info.default_gear)
    parts: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    for first in range(0, n, task.capacity):
        at = range(first, min(n, first + task.capacity))
        work = GenerateWork(
            model=task.info.name,
            labels=tuple(i % len(task.info.labels) for i in at),
            seeds=tuple(FIRST_SEED + seed + i for i in at),
            steps=steps,
            solver=gear.solver,
            guidance=1.0,
            gear=gear.name,
        )
        slots = list(range(work.rows))
        left = task.admit(work, slots, slots)
        for _ in range(max(left)):
            task.step(slots)
        parts.append(np.stack([row.pixels for row in task.collect(slots)]))
    images = np.concatenate(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": torch.from_numpy(images)}, path)
    return images


def build(
    transfer: Transfer, members: list[ResNet], seen: Images, held_out: Images, generate: Callable[[], Images]
) -> Cache:
    """The transfer set of `members`; `generate` is asked only where generated images are wanted."""
    torch.manual_seed(transfer.seed + 77)
    shares = {"seen": transfer.seen, "held_out": transfer.held_out, "generated": transfer.generated}
    if abs(sum(shares.values()) - 1.0) > 1e-6:
        raise RecipeError(f"transfer: seen + held_out + generated must be 1, got {shares}")
    origins = {"seen": lambda: seen, "held_out": lambda: held_out, "generated": generate}
    rows = []
    for name, share in shares.items():
        if not (wanted := round(share * transfer.rows)):
            continue
        if not len(images := origins[name]()):
            raise RecipeError(f"transfer: there are no {name} images, set {name} to 0")
        passes = -(-wanted // len(images))
        rows.append(to_pixels(images)[torch.cat([torch.randperm(len(images)) for _ in range(passes)])[:wanted]])
    x = torch.cat(rows)
    x = augment(x[torch.randperm(len(x))], transfer.shift, transfer.flip)
    x = mixed_up(x, transfer.mixup_share, transfer.mixup_alpha)
    return answered(members, moved(x, members, transfer))


def moved(x: Tensor, members: list[ResNet], transfer: Transfer) -> Tensor:
    """A share of the rows after ODS, each chunk along a member drawn at random."""
    for chunk in x.split(CHUNK) if transfer.ods_share else ():
        away = diversified(chunk, members[int(torch.randint(len(members), ()))], transfer.ods_size)
        taken = torch.rand(len(chunk)) < transfer.ods_share
        chunk[taken] = away[taken]
    return x


@torch.inference_mode()
def answered(members: list[ResNet], x: Tensor) -> Cache:
    """What source and members say of pixels (N, C, H, W)."""
    pixels, taps, features, logits = [], [], [], []
    for chunk in x.half().split(CHUNK):
        tap = members[0].tap(chunk.float())
        late = members[0].features(tap)
        pixels.append(chunk)
        taps.append(tap.half())
        features.append(late.half())
        logits.append(torch.stack([members[0].fc(late), *(m(chunk.float()) for m in members[1:])], 1))
    return Cache(torch.cat(pixels), torch.cat(taps), torch.cat(features), torch.cat(logits))


def cached(
    transfer: Transfer, ensemble: Path, generator: Path, members: list[ResNet], train: Images, out: Path
) -> Cache:
    """The transfer set of an ensemble's folder, from `out`/transfer where it was built before.

    `train` are all training images; the ensemble's config says how many of them its members saw.
    """
    config = read_config(ensemble, "ensemble")
    digest = hashlib.sha256(json.dumps([weights_digest(config["files"]), asdict(transfer)]).encode()).hexdigest()
    path = out / "transfer" / f"{digest[:16]}.safetensors"
    if path.is_file():
        return Cache(**load_file(path))
    cut = config["trained_on"]["images"]
    kept = out / "transfer" / f"{generator.name}-{transfer.pool}-{transfer.steps}-{transfer.seed}.safetensors"

    def generate() -> Images:
        return drawn(generator, transfer.pool, transfer.steps, transfer.seed, kept)

    cache = build(transfer, members, train[:cut], train[cut:], generate)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(vars(cache), path)
    return cache
