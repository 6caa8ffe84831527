"""Memory for what a forest keeps until it goes backward: one slab, which the next forest uses again.

Taken from the C library piece by piece, the same memory comes to a fifth more: what one forest gave back is in holes
that the next one's pieces, a little larger, do not fit. And memory that is used again need not be cleared again.
A slab is free once the last tensor in it is gone, whoever held it. Does not know: what is kept, layers.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LINE = 64  # bytes: vectors that cross two cache lines take twice the time

Memory = npt.NDArray[np.uint8]


class Slabs:
    """Those of one model; `free` are those in which nothing is kept."""

    def __init__(self) -> None:
        self.free: list[Memory] = []

    def take(self, size: int) -> Slab:
        """The smallest free one of at least `size` bytes; else a new one, in the place of the largest that is free."""
        size += LINE  # before the first line
        self.free.sort(key=len)
        fitting = next((number for number, memory in enumerate(self.free) if len(memory) >= size), None)
        if fitting is not None:
            return Slab(self.free.pop(fitting), self.free)
        if self.free:
            self.free.pop()
        memory: Memory = torch.empty(size, dtype=torch.uint8).numpy()  # without the huge pages that numpy asks for
        return Slab(memory, self.free)


class Slab:
    """Memory that is handed out from front to back, and goes to `free` after the last tensor in it."""

    def __init__(self, memory: Memory, free: list[Memory]) -> None:
        self._view = memoryview(memory)  # type: ignore[arg-type]  # which every tensor holds
        self._at, self._end = -memory.ctypes.data % LINE, len(memory)
        weakref.finalize(self._view, free.append, memory).atexit = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of no particular values; from elsewhere when the slab is full."""
        count = math.prod(shape)
        start, size = self._at, count * dtype.itemsize
        if not count or start + size > self._end:
            return torch.empty(shape, dtype=dtype)
        self._at += size + -size % LINE
        return torch.frombuffer(self._view, dtype=dtype, count=count, offset=start).view(shape)
