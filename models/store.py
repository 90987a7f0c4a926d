"""A model folder: config.json and *.safetensors, digests checked on load, never pickle.

config.json holds `kind`, `name`, what the kind needs, and `files`: file name -> sha256. The weights
digest is the sha256 over the sorted per-file digests; exit schedules and bridges name it. Weights that are long for one
file, say model.safetensors, lie in model-00001-of-00002.safetensors and so on, and are read by the one name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.api import UserError

if TYPE_CHECKING:
    from torch import Tensor

ZOO = Path(__file__).parent / "zoo"
SHARD = 14 << 20  # bytes of tensors in a file, where weights are cut into files


class StoreError(UserError):
    """A model folder that cannot be used; the message names the file and the fix."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(files: Mapping[str, str]) -> str:
    """sha256 over the sorted per-file digests."""
    return hashlib.sha256("\n".join(sorted(files.values())).encode()).hexdigest()


def model_folders(root: Path) -> Iterator[Path]:
    """Folders below `root` that hold a config.json, sorted by name."""
    yield from sorted(p.parent for p in root.glob("*/config.json"))


def read_json(path: Path) -> Any:
    """Parse a JSON file; errors name it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is not JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; a crash leaves the previous file whole."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=2) + "\n")
    fresh.replace(path)


def read_config(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """config.json of a model folder, its `kind` checked when given."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("files"), dict):
        raise StoreError(f"{folder}/config.json has no `files` table")
    if kind is not None and config.get("kind") != kind:
        raise StoreError(f"{folder}/config.json: kind is {config.get('kind')!r}, expected {kind!r}")
    return config


def member_file(folder: Path, name: str) -> Path:
    """`folder`/`name`, refused when it leaves the folder or is not safetensors."""
    path = (folder / name).resolve()
    if path.parent != folder.resolve():
        raise StoreError(f"{folder}/config.json names {name!r}, which is outside the folder")
    if path.suffix != ".safetensors":
        raise StoreError(f"{folder}/config.json names {name!r}: only .safetensors files are read")
    return path


def shards(name: str, files: Mapping[str, str]) -> list[str]:
    """The files that `name` was cut into, in order; itself where it was not."""
    pattern = re.compile(re.escape(name.removesuffix(".safetensors")) + r"-\d{5}-of-(\d{5})\.safetensors")
    found = {file: int(match[1]) for file in sorted(files) if (match := pattern.fullmatch(file))}
    return list(found) if name not in files and set(found.values()) == {len(found)} else [name]


def read_tensors(folder: Path, name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of one file, or of its shards, digests checked; half precision is upcast to float32 once, here."""
    tensors: dict[str, Tensor] = {}
    for part in shards(name, files):
        tensors |= read_file(folder, part, files)
    return tensors


def read_file(folder: Path, name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    """As `read_tensors`, of the file itself."""
    from safetensors.torch import load

    path = member_file(folder, name)
    if not path.is_file():
        raise StoreError(f"{path} does not exist, but config.json lists it")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != files[name]:
        raise StoreError(f"{path} does not match its digest in config.json: restore the file or re-export the model")
    return {k: v.float() if v.is_floating_point() else v for k, v in load(raw).items()}


def write_model(
    folder: Path,
    config: dict[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    keep_dtype: bool = False,
    shard: int | None = None,
) -> str:
    """Write tensors (floats as float16, or as they are with `keep_dtype`) and config.json; returns the digest.

    A file with more than `shard` bytes of tensors is cut.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, tensors in files.items():
        half = {k: v.half() if v.is_floating_point() and not keep_dtype else v for k, v in tensors.items()}
        ready = {k: v.detach().cpu().contiguous() for k, v in half.items()}
        for part, some in cut(name, ready, shard).items():
            path = member_file(folder, part)
            fresh = path.with_name(path.name + ".new")
            fresh.write_bytes(save(some))
            fresh.replace(path)
            digests[part] = sha256(path)
    write_json(folder / "config.json", {**config, "files": digests})
    return weights_digest(digests)


def cut(name: str, tensors: dict[str, Tensor], most: int | None) -> dict[str, dict[str, Tensor]]:
    """Tensors by the file they go into: `name`, or as many shards as it takes for each to have `most` bytes at most.

    A tensor is not cut: one that is larger has a shard for itself.
    """
    parts: list[dict[str, Tensor]] = [{}]
    room = most or 0
    for key, tensor in tensors.items():
        if most is not None and parts[-1] and tensor.nbytes > room:
            parts.append({})
            room = most
        parts[-1][key] = tensor
        room -= tensor.nbytes
    if len(parts) == 1:
        return {name: tensors}
    stem = name.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
