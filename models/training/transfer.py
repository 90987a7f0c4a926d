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
from models.tasks.generator import load
from models.training.data import Images
from models.training.members import augment, pixels_of
from models.training.recipe import RecipeError
from models.training.session import device_of

CHUNK = 1000
MOST = {"cpu": 4 << 30, "cuda": 32 << 30}  # bytes of taps that are worth keeping
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
    logits (N, M, K) in float32.

    Where all taps would take too much room there are none, and `source` makes those of a minibatch when asked.
    """

    pixels: Tensor
    taps: Tensor
    features: Tensor
    logits: Tensor
    source: ResNet | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Cache:
        """The same on a device, where `source` is already."""
        return Cache(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, source=self.source)

    def see(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Taps (n, C', H', W') and features (n, F) of some rows, float32."""
        late = self.features[rows].float()
        if self.source is None or len(self.taps):
            return self.taps[rows].float(), late
        with torch.no_grad():
            return self.source.tap(self.pixels[rows].float()), late


def mixed_up(x: Tensor, share: float, alpha: float) -> Tensor:
    """A share of the images (N, C, H, W) mixed with another, weights from Beta(alpha, alpha)."""
    n = len(x)
    weight = torch.distributions.Beta(alpha, alpha).sample((n,)).to(x.device)
    mixed = torch.rand(n, device=x.device) < share
    weight = torch.where(mixed, weight, torch.ones_like(weight))[:, None, None, None]
    return weight * x + (1 - weight) * x[torch.randperm(n, device=x.device)]


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
    transfer: Transfer,
    members: list[ResNet],
    seen: Images,
    held_out: Images,
    generate: Callable[[], Images],
    most: int | None = None,
) -> Cache:
    """The transfer set of `members`, where they are; `generate` is asked only where generated images are wanted.

    Taps of more than `most` bytes, those of `MOST` if None, are not kept.
    """
    device = device_of(members[0])
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
        order = torch.cat([torch.randperm(len(images), device=device) for _ in range(passes)])
        rows.append(pixels_of(images, device)[order[:wanted]])
    x = torch.cat(rows)
    x = augment(x[torch.randperm(len(x), device=device)], transfer.shift, transfer.flip)
    x = mixed_up(x, transfer.mixup_share, transfer.mixup_alpha)
    return answered(members, moved(x, members, transfer), most)


def moved(x: Tensor, members: list[ResNet], transfer: Transfer) -> Tensor:
    """A share of the rows after ODS, each chunk along a member drawn at random."""
    for chunk in x.split(CHUNK) if transfer.ods_share else ():
        away = diversified(chunk, members[int(torch.randint(len(members), ()))], transfer.ods_size)
        taken = torch.rand(len(chunk), device=x.device) < transfer.ods_share
        chunk[taken] = away[taken]
    return x


@torch.inference_mode()
def answered(members: list[ResNet], x: Tensor, most: int | None = None) -> Cache:
    """What source and members say of pixels (N, C, H, W); `most` as `build` has it."""
    most = MOST[x.device.type] if most is None else most
    pixels, taps, features, logits = [], [], [], []
    for chunk in x.half().split(CHUNK):
        tap = members[0].tap(chunk.float())
        late = members[0].features(tap)
        pixels.append(chunk)
        kept = tap.half() if 2 * tap[0].numel() * len(x) <= most else tap.half()[:0]
        taps.append(kept)
        features.append(late.half())
        logits.append(torch.stack([members[0].fc(late), *(m(chunk.float()) for m in members[1:])], 1))
    return Cache(torch.cat(pixels), torch.cat(taps), torch.cat(features), torch.cat(logits), members[0])


def cached(
    transfer: Transfer, ensemble: Path, generator: Path, members: list[ResNet], train: Images, out: Path
) -> Cache:
    """The transfer set of an ensemble's folder, from `out`/transfer where it was built before on a CPU.

    `train` are all training images; the ensemble's config says how many of them its members saw. The cache lies where
    the members do.
    """
    config = read_config(ensemble, "ensemble")
    digest = hashlib.sha256(json.dumps([weights_digest(config["files"]), asdict(transfer)]).encode()).hexdigest()
    path = out / "transfer" / f"{digest[:16]}.safetensors"
    if path.is_file():
        return Cache(**load_file(path), source=members[0]).to(device_of(members[0]))
    cut = config["trained_on"]["images"]
    kept = out / "transfer" / f"{generator.name}-{transfer.pool}-{transfer.steps}-{transfer.seed}.safetensors"

    def generate() -> Images:
        return drawn(generator, transfer.pool, transfer.steps, transfer.seed, kept)

    cache = build(transfer, members, train[:cut], train[cut:], generate)
    if cache.logits.device.type == "cuda":
        return cache  # made in less time than a disk takes
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(cache.tensors(), path)
    return cache
