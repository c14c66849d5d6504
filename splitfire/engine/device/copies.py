"""Between the host's memory and a device's without waiting. On a CPU the same calls copy at once, which is how they are tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    """A copy on the device. The array may be changed afterwards: page-locked memory in between is torch's, who knows when it is read."""
    return sent_to(torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, device=device), array)


def sent_to(target: Tensor, array: NDArray[np.generic]) -> Tensor:
    """Overwrites `target`, whose shape and dtype are the array's."""
    source = torch.from_numpy(array)
    if target.is_cuda:
        source = source.pin_memory()
    return target.copy_(source, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Fetching:
    """A copy on its way to the host."""

    copy: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> NDArray[np.int64]:
        if self.done is not None:
            self.done.synchronize()
        return self.copy.numpy()


def fetch(source: Tensor) -> Fetching:
    """source: int64. What it holds when all that was launched before is over."""
    if not source.is_cuda:
        return Fetching(source.clone(), None)
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    copy.copy_(source, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # the thread sleeps: others have Python meanwhile
    done.record()
    return Fetching(copy, done)
