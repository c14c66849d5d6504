"""Rows from measurements: ours beside each opponent, targets beside the best one that they speak of. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Row, half_spread

BEST = "the best of them"  # what a target may speak of instead of a family


@dataclass(frozen=True, slots=True)
class Target:
    """`ratio` (larger is better for us) has to reach `bound`."""

    words: str
    bound: float


@dataclass(frozen=True, slots=True)
class Metric:
    """What a list of numbers is. Of rates larger is better, of times smaller."""

    name: str
    unit: str
    is_rate: bool

    def ratio(self, ours: float, theirs: float) -> float:
        return ours / theirs if self.is_rate else theirs / ours


@dataclass(frozen=True, slots=True)
class Series:
    """One contestant's measurements, turn by turn."""

    name: str
    family: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


RATE = Metric("tokens/s", "tokens/s", is_rate=True)
TTFT, ITL_P50, ITL_P99 = (Metric(name, "ms", is_rate=False) for name in ("TTFT p50", "ITL p50", "ITL p99"))


def row(case: str, metric: Metric, ours: Series, theirs: Series, target: Target | None = None) -> Row:
    ratio = metric.ratio(ours.median, theirs.median)
    words, met = ("", None) if target is None else (target.words, ratio >= target.bound)
    return Row(case, metric.name, metric.unit, ours.median, theirs.median, theirs.name, ratio, words, met, half_spread(ours.values))


def alone(case: str, metric: Metric, ours: Series, words: str = "", met: bool | None = None) -> Row:
    return Row(case, metric.name, metric.unit, ours.median, None, "", None, words, met, half_spread(ours.values))


def compare(
    case: str, metric: Metric, series: Sequence[Series], targets: Mapping[str, Target] | None = None,
    variant_targets: Mapping[str, Target] | None = None,
) -> list[Row]:  # fmt: skip
    """The first of `series` is ours: a row beside each opponent. Those of the same family are variants of ours: a row of each
    beside the first one, and beside the best opponent.

    A target of a family stands beside its best member, one of BEST beside the best opponent of all, one of a variant's flags
    beside the first of ours.
    """
    first, *rest = series
    opponents = [s for s in rest if s.family != first.family]
    rows = [row(case, metric, first, theirs, _target(metric, theirs, opponents, targets or {})) for theirs in opponents]
    for variant in (s for s in rest if s.family == first.family):
        target = next((t for flag, t in (variant_targets or {}).items() if flag in variant.name), None)
        rows.append(row(f"{case}: {variant.name}", metric, variant, first, target))
        if opponents:
            rows.append(row(f"{case}: {variant.name}", metric, variant, best(metric, opponents)))
    return rows or [alone(case, metric, first)]


def _target(metric: Metric, theirs: Series, opponents: Sequence[Series], targets: Mapping[str, Target]) -> Target | None:
    for family, target in targets.items():
        those = [s for s in opponents if family in (BEST, s.family)]
        if theirs in those and theirs == best(metric, those):
            return target
    return None


def best(metric: Metric, series: Sequence[Series]) -> Series:
    return (max if metric.is_rate else min)(series, key=lambda s: s.median)
