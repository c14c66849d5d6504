"""Closed loops against rigs that take turns, and the numbers that come out of one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Row, half_spread
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Answer, Ask, errors_of
from benchmarks.router.rig import Rig

WARM_UP_S = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """One turn of one rig."""

    answers: Sequence[Answer]
    seconds: float
    cpu_s: float  # of the router's processes

    @property
    def num_messages(self) -> int:
        return sum(a.num_messages for a in self.answers)

    @property
    def num_tokens(self) -> int:
        return sum(a.num_tokens for a in self.answers)

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def cpu_us_a_request(self) -> float:
        return 1e6 * self.cpu_s / len(self.answers)

    @property
    def ttft_ms(self) -> list[float]:
        return sorted(1e3 * a.ttft_s for a in self.answers if a.at)

    def check(self) -> Run:
        """Whoever loses requests may not count them."""
        if errors := errors_of(self.answers):
            raise RuntimeError(f"requests failed: {dict(errors)}")
        return self


@dataclass(frozen=True, slots=True)
class Loop:
    """So many streams, each asking again when it has its answer, for so long."""

    shape: FleetShape
    ask: Ask
    streams: int
    seconds: float

    def run(self, made: Rig) -> Run:
        made.attach(self.shape)
        streams = self.streams // len(made.clients) or 1
        made.all("closed", self.ask, streams, WARM_UP_S)
        cpu, began = made.cpu_s(), time.perf_counter()
        answers = made.all("closed", self.ask, streams, self.seconds)
        return Run(answers, time.perf_counter() - began, made.cpu_s() - cpu).check()


def interleaved(loop: Loop, rigs: Mapping[str, Rig], turns: int) -> dict[str, list[Run]]:
    """A, B, A, B."""
    taken: dict[str, list[Run]] = {name: [] for name in rigs}
    for _ in range(turns):
        for name, made in rigs.items():
            taken[name].append(loop.run(made))
    return taken


def values(runs: Sequence[Run], read: Callable[[Run], float]) -> list[float]:
    return [read(run) for run in runs]


def at_most(case: str, metric: str, unit: str, ours: Sequence[float], bound: float, floor: Sequence[float] | None = None) -> Row:
    """Smaller is better; beside the bare relay's, where that was measured."""
    return _row(case, metric, unit, ours, f"at most {bound:g} {unit}", lambda value: value <= bound, floor, is_rate=False)


def at_least(case: str, metric: str, unit: str, ours: Sequence[float], bound: float, floor: Sequence[float] | None = None) -> Row:
    return _row(case, metric, unit, ours, f"at least {bound:g} {unit}", lambda value: value >= bound, floor, is_rate=True)


def plain(
    case: str, metric: str, unit: str, ours: Sequence[float], floor: Sequence[float] | None = None, *, is_rate: bool = False
) -> Row:
    """Without a target."""
    return _row(case, metric, unit, ours, "", None, floor, is_rate=is_rate)


def _row(
    case: str, metric: str, unit: str, ours: Sequence[float], target: str, met: Callable[[float], bool] | None,
    floor: Sequence[float] | None, *, is_rate: bool,
) -> Row:  # fmt: skip
    value = statistics.median(ours)
    other = statistics.median(floor) if floor else None
    ratio = None if other is None else value / other if is_rate else other / value
    name = "bare relay" if floor else ""
    return Row(case, metric, unit, value, other, name, ratio, target, met(value) if met else None, half_spread(ours))
