"""Images for training and evaluation: IDX folders (MNIST's format), folders of images, and what `pack` wrote."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.api import UserError

Images = NDArray[np.uint8]  # (N, H, W, C)
Labels = NDArray[np.int64]  # (N,)


class DataError(UserError):
    """A data folder that cannot be read; the message says what was looked for."""


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, C) uint8 with their labels (N,)."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> Split:
        return Split(self.images[which], self.labels[which])


@dataclass(frozen=True)
class Splits:
    """The house's splits: validation is the last 10,000 training images, halved by purpose."""

    train: Split
    selection: Split
    conformal: Split
    test: Split


def splits(folder: Path, validation: int = 10_000) -> Splits:
    """Read `folder` and cut off the validation images (half selection, half conformal)."""
    train, test = read(folder, "train"), read(folder, "test")
    if len(train) <= validation:
        raise DataError(f"{folder} has {len(train)} training images, {validation} are for validation")
    cut, half = len(train) - validation, validation // 2
    return Splits(
        train[slice(0, cut)],
        train[slice(cut, cut + half)],
        train[slice(cut + half, len(train))],
        test,
    )


def read(folder: Path, part: str) -> Split:
    """One part, "train" or "test", of an IDX folder, of `part`/<class>/<image> folders, or packed."""
    if (packed := folder / f"{part}.safetensors").is_file():
        return unpack(packed)
    prefix = {"train": "train", "test": "t10k"}[part]
    for suffix in ("", ".gz"):
        images = folder / f"{prefix}-images-idx3-ubyte{suffix}"
        if images.is_file():
            pixels = read_idx(images)
            labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}")
            return Split(pixels[..., None], labels.astype(np.int64))
    if (folder / part).is_dir():
        return read_folder(folder / part)
    raise DataError(f"{folder} holds neither {prefix}-images-idx3-ubyte[.gz] nor a folder {part}/<class>/")


def pack(split: Split, path: Path) -> None:
    """Write a part as one file, `train.safetensors` or `test.safetensors` of a folder: read in no time."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": np.ascontiguousarray(split.images), "labels": np.ascontiguousarray(split.labels)}, path)


def unpack(path: Path) -> Split:
    """What `pack` wrote."""
    from safetensors.numpy import load_file

    found = load_file(path)
    return Split(found["images"].copy(), found["labels"].copy())


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes (big-endian header: type, rank, sizes)."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, rank = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 0x08:
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def read_folder(folder: Path) -> Split:
    """<class>/<image> below `folder`, all of one size; classes are numbered in sorted order. Order is shuffled, fixed.

    Raises DataError, naming the file, for what is not an image or has another size or number of channels.
    """
    from PIL import Image, UnidentifiedImageError

    paths = [
        (path, index)
        for index, cls in enumerate(sorted(p for p in folder.iterdir() if p.is_dir()))
        for path in sorted(cls.iterdir())
    ]
    if not paths:
        raise DataError(f"{folder} holds no <class>/<image>")
    order = np.random.default_rng(0).permutation(len(paths))
    pixels: list[Images] = []
    for i in order:
        try:
            with Image.open(paths[i][0]) as image:
                array = np.asarray(image)
        except UnidentifiedImageError as error:
            raise DataError(f"{paths[i][0]} is not an image; remove it") from error
        pixels.append(array[..., None] if array.ndim == 2 else array)
        if pixels[-1].shape != pixels[0].shape:
            raise DataError(f"{paths[i][0]} has shape {pixels[-1].shape}, other images have {pixels[0].shape}")
    return Split(np.stack(pixels), np.array([paths[i][1] for i in order], np.int64))
