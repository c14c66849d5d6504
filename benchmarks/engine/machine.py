"""What this machine can do at best, measured in the same run and with the same threads as the engine."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

READ_BYTES = 1 << 30  # far more than any cache
PRODUCT = 1536  # rows and columns: large enough for full speed, small enough for the second level of cache
RUNS = 9  # the best counts: the others were interrupted


@dataclass(frozen=True, slots=True)
class Machine:
    """Of the threads it was measured with."""

    read_bytes_per_s: float
    float_ops_per_s: float  # of fp32 or bf16 products, whichever is faster here
    int8_ops_per_s: float

    def ops_per_s(self, is_int8: bool) -> float:
        return max(self.int8_ops_per_s, self.float_ops_per_s) if is_int8 else self.float_ops_per_s

    @staticmethod
    def median(of: Sequence[Machine]) -> Machine:
        """Of several measurements."""
        return Machine(
            statistics.median(m.read_bytes_per_s for m in of),
            statistics.median(m.float_ops_per_s for m in of),
            statistics.median(m.int8_ops_per_s for m in of),
        )


class Meter:
    """Measures it again and again: what a shared machine gives changes within minutes."""

    def __init__(self, num_threads: int, read_bytes: int = READ_BYTES) -> None:
        self._num_threads = num_threads
        memory = mmap.mmap(-1, read_bytes)
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the pool's and the weights' is
        self._numbers = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)

    def measure(self) -> Machine:
        """About a second: sums over memory, products of square matrices."""
        torch.set_num_threads(self._num_threads)
        rows, vector = self._numbers.view(-1, 4096), torch.ones(4096)
        seconds = min(_best(self._numbers.sum), _best(lambda: rows @ vector))
        small = torch.randn(PRODUCT, PRODUCT)
        half = small.bfloat16()
        floats = min(_best(lambda: small @ small), _best(lambda: half @ half))
        whole = torch.randint(-100, 100, (PRODUCT, PRODUCT), dtype=torch.int8)
        num_ops = 2 * PRODUCT**3
        return Machine(self._numbers.nbytes / seconds, num_ops / floats, num_ops / _best(lambda: torch._int_mm(whole, whole)))


def _best(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
