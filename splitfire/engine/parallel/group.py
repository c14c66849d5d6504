"""The ranks of one worker that compute together, and what they tell one another: sums, and columns of the logits.

Only here is torch.distributed used: gloo between processors, NCCL between GPUs. All ranks are on one host: they find each other in a
file in memory, connect over loopback, and nobody waits longer for another than the time given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor, distributed
from torch.distributed import GatherOptions, Work
from torch.nn import functional

# No rank is on another host, and nobody else is to find what they listen on.
INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class Collectives(Protocol):
    """What torch's backends can do and their stubs do not say."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: GatherOptions) -> Work: ...


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's end. All ranks call the same methods in the same order; RuntimeError when one of them is gone or late."""

    rank: int = 0
    size: int = 1
    backend: Collectives | None = None  # None: alone

    def all_reduce(self, x: Tensor) -> Tensor:
        """x, any shape, becomes the sum over the ranks: the same bits on all of them."""
        if self.backend is not None:
            self.backend.allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """x [rows, this rank's share of num_columns] -> [rows, num_columns] on rank 0; on the others of no use."""
        if self.backend is None:
            return x
        num_rows, most = x.shape[0], -(-num_columns // self.size)
        if not num_rows:
            return x.new_empty(0, num_columns)
        mine = functional.pad(x, (0, most - x.shape[1]))  # shares travel equally wide, and only the last ones are narrower
        parts = [torch.empty_like(mine) for _ in range(0 if self.rank else self.size)]
        self.backend.gather([parts] if parts else [], [mine], GatherOptions()).wait()
        return torch.cat(parts, 1)[:, :num_columns] if parts else mine


ALONE = Group()


def join(rank: int, size: int, device: torch.device, meeting_file: int, timeout_s: float) -> Group:
    """Waits for the others. meeting_file: a descriptor of an empty file, the same for every rank, to be kept open."""
    os.environ.update(INTERFACES)
    store = distributed.FileStore(f"/proc/self/fd/{meeting_file}", size)  # type: ignore[attr-defined]
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        backend = cast(Collectives, distributed.ProcessGroupNCCL(store, rank, size, options))
    else:
        backend = cast(Collectives, distributed.ProcessGroupGloo(store, rank, size, timeout))
    group = Group(rank, size, backend)
    group.all_reduce(torch.zeros(1, device=device))  # NCCL connects with the first sum
    return group
