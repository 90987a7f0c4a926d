"""A row in flight as bytes, so that another worker can go on with it: safetensors, never pickle.

`x` and what its solver still reads of `s`, `h1`, `h2` (table.py), (C, H, W) float32; `ran`, the blocks run at each
evaluation so far; and whose row it is. Everything else follows from the job.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from models.solvers.table import STATES

Floats = NDArray[np.float32]
Blocks = NDArray[np.int16]


@dataclass(frozen=True)
class Kept:
    """Whose row a state is: digest of the model's weights, the image's seed and label."""

    weights: str
    seed: int
    label: int

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """As safetensors can hold it."""
        weights = np.frombuffer(self.weights.encode(), np.uint8)
        return {"weights": weights, "row": np.array([self.seed, self.label], np.int64)}


def pack(states: Floats, ran: Blocks, kept: Kept, reads: NDArray[np.bool_]) -> bytes:
    """States (len(STATES), C, H, W), of which `reads` are kept, and blocks run (evaluations done,)."""
    needed = {name: state for name, state, read in zip(STATES, states, reads, strict=True) if read}
    return save({**needed, "ran": ran, **kept.tensors()})


def unpack(data: bytes, kept: Kept, reads: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[Floats, Blocks]:
    """The inverse of `pack`, zeros for states that were not kept; `reads` (evaluations + 1, len(STATES)).

    Raises:
        ValueError: bytes that are no state, or not that of this row at any evaluation.
    """
    try:
        found = load(data)
        ran: Blocks = found.pop("ran")
        whose = {name: found.pop(name) for name in kept.tensors()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a saved row cannot be read: {error!r}") from error
    for name, wanted in kept.tensors().items():
        if whose[name].dtype != wanted.dtype or not np.array_equal(whose[name], wanted):
            raise ValueError(f"a saved row is of another job or model: {name} differs")
    if ran.dtype != np.int16 or ran.ndim != 1 or not 1 <= len(ran) < len(reads):
        raise ValueError(f"a saved row had {ran.shape} {ran.dtype} evaluations of {len(reads) - 1}")
    names = [name for name, read in zip(STATES, reads[len(ran)], strict=True) if read]
    if sorted(found) != sorted(names):
        raise ValueError(f"a saved row has {sorted(found)}, needed after {len(ran)} evaluations: {sorted(names)}")
    states = np.zeros((len(STATES), *shape), np.float32)
    for name, state in found.items():
        if state.dtype != np.float32 or state.shape != shape or not np.isfinite(state).all():
            raise ValueError(f"a saved row's {name} is {state.dtype} {state.shape}, needed: finite float32 {shape}")
        states[STATES.index(name)] = state
    return states, ran
