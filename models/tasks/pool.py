"""Slots of a generator: states on the device, per-evaluation tables on the host; allocated once.

New rows are written down on the host only, so that their coming costs no launch of its own; their first evaluation
draws the initial noise of all that begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.solvers.noise import normal
from models.solvers.table import FIELDS, INDEX, STATES, Trajectory
from models.tasks.device import Uplink

MAX_EVALUATIONS = 2 * 1000 - 1
START = -1  # evaluation that keys the initial noise

Ints = NDArray[np.int64]


class RowPool:
    """Everything that belongs to a row in flight, by slot and, where it has one, by evaluation.

    `states` never moves, so that CUDA graphs can hold its address; `spare` slots after the last belong to rows that
    only fill up a batch.
    """

    def __init__(self, capacity: int, row_shape: tuple[int, ...], device: torch.device, spare: int = 0) -> None:
        self.device, self.row_shape, self.capacity = device, row_shape, capacity
        self.uplink = Uplink(device)
        self.states = torch.zeros(len(STATES), capacity + spare, *row_shape, device=device)
        self.x = self.states[0]
        table = (capacity, MAX_EVALUATIONS)
        self.coef = np.zeros((*table, len(FIELDS)), np.float32)
        self.u = np.zeros(table, np.float32)
        self.depth, self.ran = np.zeros(table, np.int16), np.zeros(table, np.int16)
        self.copies = np.zeros(table, np.int8)
        self.noisy = np.zeros(table, bool)
        self.done, self.evaluations = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        self.seed, self.label = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        self.guidance = np.ones(capacity, np.float32)
        self.scale = np.zeros(capacity, np.float32)
        self.fresh, self.moved = np.zeros(capacity, bool), np.zeros(capacity, bool)
        self.trajectories: dict[int, Trajectory] = {}

    def place(
        self,
        slots: Sequence[int],
        trajectory: Trajectory,
        depths: Sequence[int],
        guided: NDArray[np.bool_],
        guidance: float,
        labels: Sequence[int],
        seeds: Ints,
    ) -> None:
        """Fill slots with rows of one trajectory that have had no evaluation; `begin` sets their states.

        Args:
            depths, guided: (evaluations,) blocks to run, and whether an unconditional network row runs too.
            labels, seeds: per slot.
        """
        to, n = list(slots), len(trajectory.u)
        self.coef[to, :n] = trajectory.coef
        self.u[to, :n] = trajectory.u
        self.depth[to, :n] = depths
        self.copies[to, :n] = np.where(guided, 2, 1)
        self.noisy[to, :n] = trajectory.coef[:, INDEX["a_n"]] > 0
        self.done[to], self.evaluations[to], self.moved[to] = 0, n, False
        self.scale[to], self.fresh[to] = trajectory.scale, True
        self.trajectories |= dict.fromkeys(slots, trajectory)
        self.seed[to], self.label[to], self.guidance[to] = seeds, labels, guidance

    def begin(self, rows: Ints) -> None:
        """Set the states of those of `rows` that are fresh: the initial noise, and zeros."""
        fresh = rows[self.fresh[rows]]
        if not len(fresh):
            return
        here, keys, scale = self.uplink.send(fresh, self.seed[fresh], self.scale[fresh])
        x = scale[:, None, None, None] * normal(keys, torch.full_like(keys, START), self.row_shape)
        self.states.index_fill_(1, here, 0.0)
        self.x[here] = x
        self.fresh[fresh] = False

    def resume(self, slots: Sequence[int], states: NDArray[np.float32], ran: Sequence[NDArray[np.int16]]) -> None:
        """Put placed rows where others were: states (len(STATES), slots, C, H, W), blocks run at each evaluation."""
        self.states[:, self.on_device(slots)] = self.uplink.send(states)[0]
        self.fresh[list(slots)] = False
        for slot, depths in zip(slots, ran, strict=True):
            self.ran[slot, : len(depths)], self.done[slot] = depths, len(depths)

    def replan(self, slots: Sequence[int], depths: Sequence[int]) -> None:
        """Blocks to run (evaluations,) from each row's next evaluation on."""
        for slot in slots:
            done, n = self.done[slot], self.evaluations[slot]
            self.depth[slot, done:n] = depths[done:]

    def advance(self, rows: Ints, at: Ints, ran: Ints) -> None:
        """Rows have had evaluation `at` (N,), and ran so many blocks."""
        self.ran[rows, at] = ran
        self.done[rows] += 1
        self.moved[rows] = True

    def estimates(self, slots: Sequence[int]) -> Tensor:
        """What the last evaluation of each row says of x0 (N, C, H, W), of rows that moved here."""
        weights = np.stack([self.trajectories[slot].estimate[self.done[slot] - 1] for slot in slots], 1)
        scale = self.uplink.send(weights.astype(np.float32))[0][:, :, None, None, None]
        return (scale * self.states[:, self.on_device(slots)]).sum(0)

    def by_depth(self, slots: Ints) -> tuple[Ints, Ints]:
        """Slots ordered by the depth of their next evaluation, deepest first, and that evaluation."""
        at = self.done[slots]
        order = np.argsort(-self.depth[slots, at], kind="stable")
        return slots[order], at[order]

    def on_device(self, values: Sequence[int] | Ints) -> Tensor:
        """Host integers as an int64 tensor on the device."""
        return self.uplink.send(np.asarray(values, np.int64))[0]
