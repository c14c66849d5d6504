"""Recorded steps: a ladder of shapes, each recorded once before serving, and any decode step replayed as the smallest that holds it.

A rung is so many rows, one of two tile heights for attention (low where every sequence has one row or a few, high where drafts are
verified), and with or without prefixes that sequences share. Every sequence has a row, so a rung has places for as many sequences as
rows, and which has how many rows is read on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from splitfire.engine.kernels.gpu.prepare import FEW_ROWS
from splitfire.engine.models.gpu import StepShape

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
GROUPS = 8  # that share a prefix
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class Recorded(Generic[T]):
    """`replay` computes what was recorded, from and into the same memory; `result` lies there."""

    result: T
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, run: Callable[[], T]) -> Recorded[T]: ...


class CudaRecorder:
    """CUDA graphs. They share one piece of memory: never do two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside = torch.cuda.Stream(device)  # one for all: cuBLAS keeps memory for every stream that it has seen
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            run()  # kernels are compiled and libraries make their plans now: neither can be recorded
        torch.cuda.current_stream(self._device).wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._aside):
            result = run()
        return Recorded(result, graph.replay)


class Ladder(Generic[T]):
    """The recorded shapes. Engine thread only, but for the first recording."""

    def __init__(self, low_rows: int, *, shares: bool) -> None:
        """low_rows: of a sequence, that attention of low tiles takes. shares: whether a layer sees all of the context."""
        self._shares = shares
        self._rows = ROWS
        self._low_rows = low_rows
        self._recorded: dict[StepShape, Recorded[T]] = {}

    def shapes(self) -> list[StepShape]:
        """All of them, the largest first: the memory that it takes serves the others too."""
        heights = [(rows, few) for rows in self._rows for few in (1, FEW_ROWS) if few == 1 or rows > self._low_rows]
        alone = [self._shape(rows, few, 0) for rows, few in heights]
        shared = [self._shape(rows, few, GROUPS) for rows, few in heights if rows > 1 and self._shares]
        return sorted((*alone, *shared), key=lambda shape: (-shape.num_rows, -shape.most_few, -shape.num_groups))

    def record(self, recorder: Recorder, run: Callable[[StepShape], T], on_progress: Callable[[int, int], None]) -> None:
        """`run` computes a step of a shape from memory that stays where it is. on_progress: recorded, of all."""
        shapes = self.shapes()
        for done, shape in enumerate(shapes):
            on_progress(done, len(shapes))
            self._recorded[shape] = recorder.record(lambda shape=shape: run(shape))  # type: ignore[misc]
        on_progress(len(shapes), len(shapes))

    def fit(self, num_rows: int, most_few: int, *, shares: bool) -> tuple[StepShape, Recorded[T]] | None:
        """The smallest that holds a step, with or without shared prefixes; None when there is none."""
        at = bisect_left(self._rows, num_rows)
        if at == len(self._rows) or most_few > FEW_ROWS:
            return None
        shape = self._shape(self._rows[at], most_few, GROUPS if shares and self._shares else 0)
        recorded = self._recorded.get(shape)
        return None if recorded is None else (shape, recorded)

    def _shape(self, num_rows: int, most_few: int, num_groups: int) -> StepShape:
        return StepShape(num_rows, num_rows, self._low_rows if most_few <= self._low_rows else FEW_ROWS, 0, num_groups)
