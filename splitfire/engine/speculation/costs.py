"""What a step costs: measured at start by sequences and rows, corrected while it runs. Pure.

`plain` is a step in which every sequence has one row; `added` is what further rows add. The corrections are running
ratios: one for everything (other work on the machine, longer contexts), which the numbers here do not contain, because
choices do not depend on it, and one for each power of two of extra rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

MAX_EXTRA_ROWS = 256  # drafts of one step, all sequences together
SMOOTHING = 0.1  # of each new measurement
RELAXING = 0.005  # of a ratio towards 1 with each step: one that is too high is tried again
MAX_RATIO = 8.0
REFRESH = 16  # steps with drafts until what was learnt from them counts


@dataclass(frozen=True, slots=True)
class CostPoint:
    """A measured step."""

    num_sequences: int
    num_rows: int
    seconds: float


class StepCosts:
    """The cost table. Any positive points will do; between them it is linear, beyond them it goes on as they end."""

    def __init__(self, points: Sequence[CostPoint], draft_points: Sequence[CostPoint] = ()) -> None:
        curves: dict[int, list[CostPoint]] = defaultdict(list)
        for point in points:
            curves[point.num_sequences].append(point)
        if not curves:
            raise ValueError("points: is empty, at least one is needed")
        self._curves = {n: _rising(sorted(c, key=lambda p: p.num_rows)) for n, c in sorted(curves.items())}
        self._draft_points = _rising(sorted(draft_points, key=lambda p: p.num_rows))
        self._log_ratio = 0.0
        self.ratio = 1.0  # by how much steps are slower now than when they were measured
        self._log_shape = [0.0] * (MAX_EXTRA_ROWS.bit_length() + 1)  # by bit length of the extra rows
        self._num_observed = 0
        self._measured: dict[int, list[float]] = {}  # what `added` would be without the ratios
        self._added: dict[int, list[float]] = {}
        self._plain: dict[int, float] = {}
        self._draft: dict[int, float] = {}

    def plain(self, num_sequences: int) -> float:
        """Seconds of a step without drafts, as measured at start; times `ratio`: now."""
        found = self._plain.get(num_sequences)
        if found is None:
            firsts = [CostPoint(n, n, float(_at(curve, np.array([n]))[0])) for n, curve in self._curves.items()]
            found = self._plain[num_sequences] = float(_at(firsts, np.array([num_sequences]))[0])
        return found

    def added(self, num_sequences: int) -> list[float]:
        """[0 .. MAX_EXTRA_ROWS] seconds that so many draft rows add, never falling; times `ratio`: now. To be read only."""
        found = self._added.get(num_sequences)
        if found is None:
            found = self._added[num_sequences] = self._make_added(num_sequences)
        return found

    def draft(self, num_sequences: int) -> float:
        """Seconds in which the draft model makes one token for each of so many sequences; times `ratio`: now."""
        found = self._draft.get(num_sequences)
        if found is None:
            points = self._draft_points
            found = self._draft[num_sequences] = float(_at(points, np.array([num_sequences]))[0]) if points else 0.0
        return found

    def observe(self, num_sequences: int, num_extra: int, seconds: float) -> None:
        """A step of so many decoding sequences and draft rows, and nothing else, took this long."""
        num_extra = min(num_extra, MAX_EXTRA_ROWS)
        expected = self.plain(num_sequences) + (self.added(num_sequences)[num_extra] if num_extra else 0.0)
        error = max(-2.0, min(2.0, log(max(seconds, 1e-9) / max(expected * self.ratio, 1e-9))))
        self._log_ratio += SMOOTHING * error
        self.ratio = exp(self._log_ratio)
        if not num_extra:
            return
        shape, bucket = self._log_shape, num_extra.bit_length()
        for i in range(len(shape)):
            shape[i] *= 1.0 - RELAXING
        shape[bucket] = max(-log(MAX_RATIO), min(log(MAX_RATIO), shape[bucket] + SMOOTHING * error))
        self._num_observed += 1
        if self._num_observed % REFRESH == 0:
            self._added.clear()

    def _make_added(self, num_sequences: int) -> list[float]:
        measured = self._measured.get(num_sequences)
        if measured is None:
            measured = self._measured[num_sequences] = self._between(num_sequences)
        added: list[float] = []
        for length, shape in enumerate(self._log_shape):  # rows of one bit length
            factor, lowest = exp(shape), added[-1] if added else 0.0
            added += [max(lowest, factor * seconds) for seconds in measured[1 << length >> 1 : 1 << length]]
        return added

    def _between(self, num_sequences: int) -> list[float]:
        """Between the curves measured for fewer and for more sequences."""
        measured = list(self._curves)
        below = max((n for n in measured if n <= num_sequences), default=measured[0])
        above = min((n for n in measured if n >= num_sequences), default=measured[-1])
        share = 0.0 if above == below else (num_sequences - below) / (above - below)
        rows = np.arange(MAX_EXTRA_ROWS + 1)
        low, high = (_at(self._curves[n], n + rows) - _at(self._curves[n], np.array([n])) for n in (below, above))
        return [*(low + (high - low) * share).tolist()]


def _rising(points: Sequence[CostPoint]) -> list[CostPoint]:
    """Noise does not make more rows cheaper."""
    risen: list[CostPoint] = []
    for point in points:
        seconds = max(point.seconds, risen[-1].seconds if risen else 0.0)
        risen.append(CostPoint(point.num_sequences, point.num_rows, seconds))
    return risen


def _at(points: Sequence[CostPoint], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Linear between points ordered by rows; before the first constant, after the last as the last two go."""
    measured, seconds = np.array([p.num_rows for p in points]), np.array([p.seconds for p in points])
    slope = (seconds[-1] - seconds[-2]) / (measured[-1] - measured[-2]) if len(points) > 1 else 0.0
    beyond: NDArray[np.float64] = slope * np.maximum(rows - measured[-1], 0)
    within: NDArray[np.float64] = np.interp(rows, measured, seconds)
    return within + beyond
