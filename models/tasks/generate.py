"""/generate: early-exit diffusion sampling over a pool of slots.

Every row carries its own time, solver, guidance and depth; a tick gathers the rows, runs the network
sorted by depth, applies one fused update and scatters back. State is float32, whatever the network runs in. On CUDA
nothing in a tick waits for the device but the end of the tick before; pixels of finished rows are copied beside the
next tick, which is why a row has one step more there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import GeneratedRow, GenerateWork, ModelInfo, SolverName, SolverOptions, StepStats, UserError
from models.backbones.interface import Backbone
from models.backends.cudagraph import CudaGraph
from models.backends.interface import CONDITION_BLOCK, Backend
from models.exits.plan import plan
from models.registry import SOLVERS, resolve
from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.process import Process
from models.solvers.table import INDEX, Trajectory
from models.tasks.decoding import DecodeStage, levels, to_uint8
from models.tasks.device import OneAhead, Readback, cuda_mark, side_stream_copy
from models.tasks.graphed import tick_graphs
from models.tasks.pool import Ints, RowPool
from models.tasks.receipts import receipt
from models.tasks.saved import Kept, pack, unpack
from models.tasks.tick import Tick


class GenerateTask:
    """A generator and its pool of `capacity` slots; see models.api.Task for the contract.

    Args:
        backend: runs the backbone's forward.
        decoding: the codec's stage; None where states are pixels.
        guided_channels: leading channels of the output that guidance acts on; None for all, 0 refuses guidance.
        macs: conv + linear MACs of the network by depth, where a dropped block leaves some to run.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: Backbone,
        process: Process,
        capacity: int,
        device: torch.device,
        *,
        backend: Backend,
        decoding: DecodeStage | None = None,
        guided_channels: int | None = None,
        macs: dict[int, int] | None = None,
    ) -> None:
        self.info, self.model, self.process, self.capacity = info, model, process, capacity
        self.device, self.backend, self.decoding = device, backend, decoding
        self.guided_channels = guided_channels
        self.macs = macs or dict.fromkeys(range(model.depth + 1), 0)
        self.trajectory = lru_cache(64)(self._trajectory)
        self.gears = {gear.name: gear for gear in info.gears}
        cuda = device.type == "cuda"
        self.pool = RowPool(capacity, model.row_shape, device, spare=int(isinstance(backend, CudaGraph)))
        self.graphs = tick_graphs(self.pool, backend, model)
        self.readback = Readback(side_stream_copy(device)) if cuda and decoding is None else None
        self.ahead = OneAhead(cuda_mark(device)) if cuda else None

    @torch.inference_mode()
    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Coefficients and depths of every evaluation."""
        self._place(work, indices, slots)
        return self._left(slots)

    @torch.inference_mode()
    def restore(
        self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]
    ) -> Sequence[int]:
        """As `admit`, from saved states; ValueError where one is damaged, or of another row or other weights."""
        reads = self.trajectory(work.solver, work.steps, work.solver_options).reads
        rows = [
            unpack(state, Kept(self.info.weights, work.seeds[i], work.labels[i]), reads, self.model.row_shape)
            for i, state in zip(indices, states, strict=True)
        ]
        self._place(work, indices, slots)
        self.pool.resume(slots, np.stack([row for row, _ in rows], 1), [ran for _, ran in rows])
        left = self._left(slots)
        if self.decoding:
            self.decoding.enter([slot for slot, n in zip(slots, left, strict=True) if n == 1])
        return left

    def _left(self, slots: Sequence[int]) -> list[int]:
        """Steps to come: evaluations, and one to decode, or for the pixels to reach the host."""
        more = self.decoding is not None or self.readback is not None
        left = self.pool.evaluations[list(slots)] - self.pool.done[list(slots)] + more
        return [int(n) for n in left]

    def _place(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> None:
        """Tables of new rows; their states are not set."""
        if self.guided_channels == 0 and work.guidance != 1.0:
            raise UserError(f"{self.info.name} has no null label to guide with: leave guidance at 1", "guidance")
        trajectory = self.trajectory(work.solver, work.steps, work.solver_options)
        low, high = work.guidance_interval
        seeds = np.array([work.seeds[i] for i in indices], np.int64)
        self.pool.place(
            slots,
            trajectory,
            depths=plan(self.gears[work.gear].schedule, trajectory.u),
            guided=(work.guidance != 1.0) & (trajectory.u >= low) & (trajectory.u <= high),
            guidance=work.guidance,
            labels=[work.labels[i] for i in indices],
            seeds=seeds,
        )
        if self.decoding:
            self.decoding.forget(slots)
        if self.readback is not None:
            self.readback.forget(slots)

    def shift(self, work: GenerateWork, slots: Sequence[int]) -> None:
        """Depths of the evaluations to come, by the schedule of the work's gear."""
        trajectory = self.trajectory(work.solver, work.steps, work.solver_options)
        self.pool.replan(slots, plan(self.gears[work.gear].schedule, trajectory.u))

    def _trajectory(self, solver: SolverName, steps: int, options: SolverOptions) -> Trajectory:
        made: Trajectory = resolve(SOLVERS, solver)(self.process, steps, options)
        return made

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> StepStats:
        """One network evaluation and one update for every row that needs one; decodes some of those that do not.

        On CUDA it returns when the tick before this one is done (see OneAhead).
        """
        pool, listed = self.pool, np.asarray(slots)
        drawn = pool.done[listed] >= pool.evaluations[listed]
        drawing, ready = listed[~drawn], listed[drawn].tolist()
        chosen = self.decoding.choose(ready, len(drawing)) if self.decoding else []
        pixels = self.decoding.decode(pool.x[pool.on_device(chosen)]) if self.decoding and chosen else None
        stats = self._draw(drawing) if len(drawing) else StepStats(rows=0)
        if self.decoding and pixels is not None:
            self.decoding.keep(chosen, *pixels)
        if self.readback is not None:
            self._send([slot for slot in ready if slot not in self.readback])
        if self.ahead is not None:
            self.ahead.queued()
        waiting = frozenset(ready) - frozenset(chosen) if self.decoding else frozenset[int]()
        return replace(stats, rows=stats.rows + len(chosen), decoded=len(chosen), waiting=waiting)

    def _draw(self, slots: Ints) -> StepStats:
        """One evaluation of rows that have some to come; those move last, when nothing can fail any more."""
        pool, tick = self.pool, Tick.of(self.pool, slots, self.model.null_label)
        rows, at = tick.rows, tick.at
        pool.begin(rows)
        ran = self._run(tick)
        copies, bins = tick.copies, np.minimum((pool.u[rows, at] * 10).astype(int), 9)
        stats = StepStats(
            rows=len(rows),
            layer_evals=int((ran * copies).sum()),
            layer_evals_full=int(self.model.depth * copies.sum()),
            depth_counts=Counter(zip(bins.tolist(), ran.tolist(), strict=True)),
        )
        pool.advance(rows, at, ran)
        ended = rows[pool.done[rows] == pool.evaluations[rows]].tolist()
        if self.decoding:
            self.decoding.enter(ended)
        elif self.readback is not None:
            self._send(ended)
        return stats

    def _run(self, tick: Tick) -> Ints:
        """Network and update of a tick's rows; the blocks that each ran."""
        whole = self.guided_channels is None or not tick.paired
        if self.graphs is not None and whole and (ran := self.graphs.whole(tick)) is not None:
            return ran
        output, variance, per_block = self._network(tick)
        if self.graphs is not None and len(tick.rows) <= self.graphs.most:
            self.graphs.finish(tick, output, variance)
        else:
            self._finish(tick, output, variance)
        return tick.ran(per_block)

    def _send(self, slots: list[int]) -> None:
        """Start pixels of finished rows on their way to the host."""
        if slots and self.readback is not None:
            self.readback.send(slots, levels(self.pool.x[self.pool.on_device(slots)]).contiguous())

    def _network(self, tick: Tick) -> tuple[Tensor, Tensor | None, list[int]]:
        """Guided output and learned variance (N, C, H, W) of a tick's rows, and network rows by block."""
        pool = self.pool
        c_in = tick.coef[tick.source, INDEX["c_in"]]
        here, c_in, first, last, guidance = pool.uplink.send(
            tick.rows[tick.source], c_in, tick.first, tick.last, pool.guidance[tick.rows]
        )
        x = pool.x[here] * c_in[:, None, None, None]
        output, per_block = self.backend(x, self._condition(tick), tick.depths)
        conditional, variance = output[first] if tick.paired else output, None
        if self.model.learned_variance:
            conditional, variance = conditional.chunk(2, dim=1)
        if tick.paired:
            plain = output[last][:, : conditional.shape[1]]
            conditional = self._guide(conditional, plain, guidance[:, None, None, None])
        return conditional, variance, per_block

    def _guide(self, conditional: Tensor, plain: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance; where a row has no unconditional output of its own, `plain` is its own."""
        guided = plain + scale * (conditional - plain)
        if self.guided_channels is None:
            return guided
        return torch.cat([guided[:, : self.guided_channels], conditional[:, self.guided_channels :]], dim=1)

    def _condition(self, tick: Tick) -> Tensor:
        """Conditioning (M, ...) of network rows; on a CPU each distinct (time, label) once, in blocks of fixed shape.

        One-token matmuls give other bits at other batch sizes; a fixed shape keeps a row's bits its own. Elsewhere bits
        depend on the batch anyway, and few large calls are faster.
        """
        if self.device.type != "cpu":
            return self.backend.condition(*self.pool.uplink.send(tick.times, tick.labels))
        keys = np.stack([tick.times.view(np.int32).astype(np.int64), tick.labels])
        distinct, inverse = np.unique(keys, axis=1, return_inverse=True)
        padded = np.pad(distinct, ((0, 0), (0, -distinct.shape[1] % CONDITION_BLOCK)), mode="edge")
        t, y = self.pool.uplink.send(padded[0].astype(np.int32).view(np.float32), padded[1])
        blocks = [
            self.backend.condition(*block)
            for block in zip(t.split(CONDITION_BLOCK), y.split(CONDITION_BLOCK), strict=True)
        ]
        return torch.cat(blocks)[self.pool.on_device(inverse.reshape(-1))]

    def _finish(self, tick: Tick, output: Tensor, variance: Tensor | None) -> None:
        """The update of a tick's rows, and their new states."""
        pool, rows, at = self.pool, tick.rows, tick.at
        noisy = np.flatnonzero(pool.noisy[rows, at])
        here, coef, which, seeds, when = pool.uplink.send(rows, tick.coef, noisy, pool.seed[rows[noisy]], at[noisy])
        z = torch.zeros(len(rows), *self.model.row_shape, device=self.device)
        if len(noisy):
            z[which] = normal(seeds, when, self.model.row_shape)
        x, s, h1, h2 = pool.states[:, here]
        pool.states[:, here] = torch.stack(update(coef, x, s, h1, h2, output, z, variance))

    @torch.inference_mode()
    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        """What rows need to go on elsewhere, and the blocks they ran; nothing before their first evaluation."""
        pool = self.pool
        states = pool.states[:, pool.on_device(slots)].cpu().numpy()
        saved = []
        for i, slot in enumerate(slots):
            done, kept = pool.done[slot], Kept(self.info.weights, int(pool.seed[slot]), int(pool.label[slot]))
            reads = pool.trajectories[slot].reads[done]
            saved.append(pack(states[:, i], pool.ran[slot, :done], kept, reads) if done else b"")
        return saved

    @torch.inference_mode()
    def preview(self, slots: Sequence[int]) -> Sequence[NDArray[np.uint8] | None]:
        """The estimate of x0 that a row's last evaluation made (Tweedie: E[x0 | x_t]), as pixels; x at the end.

        None before the first evaluation here, and for latents that take a network to decode.
        """
        pool, shown = self.pool, [slot for slot in slots if self.pool.moved[slot]]
        if not shown or (self.decoding and not self.decoding.codec.free):
            return [None] * len(slots)
        made = dict(zip(shown, to_uint8(pool.estimates(shown)), strict=True))
        return [made.get(slot) for slot in slots]

    @torch.inference_mode()
    def collect(self, slots: Sequence[int]) -> Sequence[GeneratedRow]:
        """Finished rows as uint8 pixels (H, W, C) with what they cost."""
        return [self._row(slot, image) for slot, image in zip(slots, self._pixels(slots), strict=True)]

    def _pixels(self, slots: Sequence[int]) -> Iterable[NDArray[np.uint8]]:
        if self.decoding is not None:
            return self.decoding.pixels[list(slots)]
        if self.readback is not None:
            self._send([slot for slot in slots if slot not in self.readback])
            return self.readback.take(slots)
        return to_uint8(self.pool.x[self.pool.on_device(slots)])

    def _row(self, slot: int, pixels: NDArray[np.uint8]) -> GeneratedRow:
        pool, n = self.pool, self.pool.done[slot]
        ran, copies = pool.ran[slot, :n], pool.copies[slot, :n]
        return GeneratedRow(
            pixels=pixels,
            label=int(pool.label[slot]),
            seed=int(pool.seed[slot]),
            exit_depths=tuple(ran.tolist()),
            layer_evals=int((ran * copies).sum()),
            layer_evals_full=int(self.model.depth * copies.sum()),
            macs=sum(self.macs[depth] * n for depth, n in zip(ran.tolist(), copies.tolist(), strict=True)),
            macs_full=self.macs[self.model.depth] * int(copies.sum()),
        )

    def receipt(self, work: GenerateWork, rows: Sequence[GeneratedRow]) -> dict[str, object]:
        """What the answer cost, as counted by the executor."""
        return receipt(replace(work, gear=self._served(work, rows)), rows, self.model.depth)

    def _served(self, work: GenerateWork, rows: Sequence[GeneratedRow]) -> str:
        """The cheapest gear of the ladder that shows: an evaluation ran fewer blocks than the gear before it would."""
        if not work.ladder:
            return work.gear
        times = self.trajectory(work.solver, work.steps, work.solver_options).u
        served = work.ladder[0]
        for better, gear in pairwise(work.ladder):
            depths = plan(self.gears[better].schedule, times)
            if any(ran < depth for row in rows for ran, depth in zip(row.exit_depths, depths, strict=True)):
                served = gear
        return served
