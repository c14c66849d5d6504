"""Large memory on the host: in huge pages, where the kernel has them, because a walk through hundreds of megabytes costs a
tenth more and above in small ones."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

LINE = 64  # bytes; what begins here begins on a cache line


def zeros(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, all of it resident: a machine without the memory says so now, and nobody pays for page faults later."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


class Arena:
    """One piece of memory, handed out from its beginning to its end."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = zeros(num_bytes)
        self._used = 0

    def take(self, x: Tensor) -> Tensor:
        """A copy of x in here."""
        num_bytes = x.numel() * x.element_size()
        place = self._memory[self._used : self._used + num_bytes].view(x.dtype).view(x.shape)
        self._used += line_bytes(num_bytes)
        return place.copy_(x)


def line_bytes(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // LINE) * LINE
