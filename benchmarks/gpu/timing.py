"""Time on a GPU, and what the GPU can do at most: every number is held against a copy and a product measured in the same call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.report import Row, half_spread

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how long to measure. Dry: on a CPU, once each, only to see that it runs."""

    device: torch.device
    is_dry: bool
    runs: int  # of each timing
    dtype: torch.dtype  # of computation

    @staticmethod
    def here(*, is_dry: bool) -> Bench:
        if is_dry:
            return Bench(torch.device("cpu"), True, 1, torch.float32)  # Triton's interpreter computes bf16 wrongly
        return Bench(torch.device("cuda"), False, 20, torch.bfloat16)

    @property
    def num_multiprocessors(self) -> int:
        return 3 if self.is_dry else torch.cuda.get_device_properties(self.device).multi_processor_count

    def times(self, *runs: Run, in_a_row: int = 1) -> list[list[float]]:
        """Seconds of each, taking turns, with nothing of the last turn in the cache. in_a_row: runs that a turn has, launched without
        waiting, so that the host's part of all but the first hides behind the one before."""
        for run in runs:
            run()  # compiles
        taken: list[list[float]] = [[] for _ in runs]
        for _ in range(self.runs):
            for run, found in zip(runs, taken, strict=True):
                found.append(self._turn(run, 1 if self.is_dry else in_a_row))
        return taken

    def _turn(self, run: Run, count: int) -> float:
        if self.is_dry:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        torch.empty(256 << 20, dtype=torch.uint8, device=self.device).zero_()  # five times the second-level cache
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / count

    def graph(self, run: Run) -> Run:
        """The same, recorded: launches cost nothing then. On a CPU itself."""
        if self.is_dry:
            return run
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second of a copy, read and written together; bf16 operations a second of a product."""

    copy: float
    product: float

    @staticmethod
    def measure(bench: Bench) -> Ceilings:
        num_bytes, side = (1 << 20, 128) if bench.is_dry else (2 << 30, 8192)
        source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
        copied, multiplied = bench.times(lambda: target.copy_(source), lambda: a @ b)
        return Ceilings(2 * num_bytes / statistics.median(copied), 2 * side**3 / statistics.median(multiplied))


def floor_row(case: str, ours: list[float], floor_s: float, what: str, least: float | None = None) -> Row:
    """How far from what the GPU could do: floor over time."""
    seconds = statistics.median(ours)
    share = floor_s / seconds
    target = "reported" if least is None else f"at least {least:g} of the floor"
    met = None if least is None else share >= least
    return Row(case, "beside its floor", "ms", 1e3 * seconds, 1e3 * floor_s, what, share, target, met, 1e3 * half_spread(ours))


def pair_row(case: str, ours: list[float], theirs: list[float], name: str, least: float | None = None) -> Row:
    mine, other = statistics.median(ours), statistics.median(theirs)
    target = "reported" if least is None else f"at least {least:g}x"
    met = None if least is None else other / mine >= least
    return Row(case, "time", "ms", 1e3 * mine, 1e3 * other, name, other / mine, target, met, 1e3 * half_spread(ours))


def bound_row(case: str, metric: str, unit: str, value: float, most: float) -> Row:
    return Row(case, metric, unit, value, None, "", None, f"at most {most:g} {unit}".strip(), value <= most, 0.0)
