"""Where a task runs, and how host and device pass each other what they have without waiting.

On CUDA a copy between pageable memory and the device waits for all work before it. What goes to the device therefore
goes through pinned memory, all of a tick in one copy; finished pixels come back on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16  # bytes; every array of a packed copy begins at a multiple
Wait = Callable[[], object]
Copy = Callable[[Tensor], tuple[Tensor, Wait]]  # starts a copy to the host: that, and what waits until it is complete


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; a device that is not there is refused.

    On CUDA float32 is float32 from here on: no TF32, in which a classifier's thresholds were not fitted. Attention is
    not cuDNN's, which plans anew for every number of rows: here that changes with every tick.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available here: set OFFRAMP_DEVICE to cpu or auto")
    device = torch.device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


class Uplink:
    """Host arrays to the device. `packed`, the default on CUDA: in one copy that the host does not wait for."""

    def __init__(self, device: torch.device, packed: bool | None = None) -> None:
        self.device = device
        self.packed = device.type == "cuda" if packed is None else packed

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Tensors on the device; on the CPU, unless packed, of the arrays' own memory."""
        if not self.packed:
            return [torch.as_tensor(array, device=self.device) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays])
        host = self._pinned(int(ends[-1]))
        bytes_of, starts = host.numpy(), [0, *ends[:-1].tolist()]
        for array, start in zip(arrays, starts, strict=True):
            bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = host.to(self.device, non_blocking=True)
        return [
            there[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

    def write(self, to: Tensor, array: NDArray[Any]) -> None:
        """Fill a contiguous tensor on the device, where it lies, from an array of its shape and type."""
        host = self._pinned(array.nbytes)
        host.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        to.copy_(host.view(_dtype(array)).view(array.shape), non_blocking=True)

    def _pinned(self, size: int) -> Tensor:
        """Bytes that torch does not give out again before copies from them are done."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def _dtype(array: NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class Readback:
    """Pixels of finished rows on their way to the host."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._under_way: dict[int, tuple[Tensor, Wait]] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._under_way

    def send(self, slots: Sequence[int], pixels: Tensor) -> None:
        """Start with the pixels (N, H, W, C) of `slots`."""
        images, wait = self._copy(pixels)
        self._under_way |= {slot: (image, wait) for slot, image in zip(slots, images, strict=True)}

    def take(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Pixels (H, W, C) of slots that were sent; waits for those that are not here yet."""
        found = []
        for slot in slots:
            image, wait = self._under_way.pop(slot)
            wait()
            found.append(image.numpy().copy())
        return found

    def forget(self, slots: Sequence[int]) -> None:
        """Slots that were given to new rows."""
        for slot in slots:
            self._under_way.pop(slot, None)


def at_once(value: Tensor) -> tuple[Tensor, Wait]:
    """A Copy that is complete when it is returned; on the CPU the tensor itself."""
    return value.cpu(), lambda: None


def side_stream_copy(device: torch.device) -> Copy:
    """Copies to pinned memory on a CUDA stream of their own, after what is queued by now, beside what comes."""
    stream = torch.cuda.Stream(device)

    def copy(value: Tensor) -> tuple[Tensor, Wait]:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(value, non_blocking=True)
            value.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        return host, done.synchronize

    return copy


class OneAhead:
    """Lets the host queue a tick while the device runs the one before, and no more.

    So a tick's wall time is the longer of the two, which deadlines and admission are judged by.
    `mark` notes the work queued by now and returns a function that waits for it.
    """

    def __init__(self, mark: Callable[[], Wait]) -> None:
        self._mark = mark
        self._before: Wait | None = None

    def queued(self) -> None:
        """A tick is queued: wait for the one before it."""
        before, self._before = self._before, self._mark()
        if before is not None:
            before()


def cuda_mark(device: torch.device) -> Callable[[], Wait]:
    """Marks the current stream of a CUDA device."""

    def mark() -> Wait:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event.synchronize

    return mark
