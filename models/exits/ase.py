"""The hand-made list of ASE: ten equal bins of u, two to a level, the same drop at every level.

Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models" (ICML 2024).
"""

from __future__ import annotations

from models.api import ExitSchedule, UserError

PUBLISHED_DEPTH = 28
BINS = 10
LEVELS = 5
NAMES = {
    "demo": 4.0,  # published with the authors' code, for 28 blocks
    "d3": 3.0,  # ours
    "d5": 5.0,  # ours
}


def schedule(depth: int, *, drop: float | None = None, name: str | None = None) -> ExitSchedule:
    """Level k of 0..4, from data to noise, runs the share 1 - k drop / 28 of the blocks, rounded.

    Args:
        drop: blocks dropped per level of a 28-block network; other depths keep the fractions.
        name: a known drop instead: `demo` (published), `d3`, `d5` (ours).
    """
    if (drop is None) == (name is None):
        raise UserError("exit `ase` takes either drop or name")
    if name is not None:
        if name not in NAMES:
            raise UserError(f"exit `ase` has no list named {name!r}; known: {', '.join(NAMES)}")
        drop = NAMES[name]
    if drop is None or not 0 <= drop * (LEVELS - 1) < PUBLISHED_DEPTH:
        raise UserError(f"exit `ase`: drop must be in [0, {PUBLISHED_DEPTH // (LEVELS - 1)}), got {drop}")
    per_level = [max(1, round(depth * (1 - level * drop / PUBLISHED_DEPTH))) for level in range(LEVELS)]
    per_bin = [per_level[b * LEVELS // BINS] for b in range(BINS)]
    return ExitSchedule(tuple((b + 1) / BINS for b in range(BINS)), tuple(per_bin))
