"""Measurements that take turns: every round runs each of them once, so that whatever the machine does meets all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from benchmarks.report import Row, half_spread
from benchmarks.transfer.cases import SHIPMENT_BYTES, Path, Shape
from benchmarks.transfer.ends import End

Measure = Callable[[], float]  # seconds
_runs = count(1)


@dataclass(frozen=True, slots=True)
class Compared:
    """Seconds of ours and of what it is compared with, round by round. The ratio is the median of the rounds' own."""

    case: str
    ours: Sequence[float]
    opponent: Sequence[float]
    opponent_name: str

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(self.ours, self.opponent, strict=True))

    def row(self, metric: str, target: str = "", bound: float | None = None) -> Row:
        """`bound`: what the ratio has to reach."""
        ms, theirs = [s * 1e3 for s in self.ours], statistics.median(self.opponent) * 1e3
        met = None if bound is None else self.ratio >= bound
        return Row(
            self.case, metric, "ms", statistics.median(ms), theirs, self.opponent_name, self.ratio, target, met, half_spread(ms)
        )


def interleave(measures: dict[str, Measure], num_rounds: int, num_warmups: int = 2) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(num_warmups + num_rounds):
        for name, measure in measures.items():
            seconds = measure()
            if turn >= num_warmups:
                taken[name].append(seconds)
    return taken


@dataclass(frozen=True, slots=True)
class Ours:
    """What can be measured between our two ends."""

    sending: End
    receiving: End

    def memcpy(self) -> float:
        return float(self.receiving.do("memcpy"))

    def wire(self, box: str, *args: object) -> float:
        """One shipment over the transport alone, from the first send to the last byte in its place."""
        run = next(_runs)
        self.receiving.begin(f"receive_{box}", run, *args)
        self.sending.begin(f"send_{box}", run, *args)
        began, ended = self.sending.result(), self.receiving.result()
        return float(ended - began)

    def path(self, path: Path) -> float:
        """One hand-off between two agents, from the offer until every block is verified and in its pool."""
        run = next(_runs)
        self.receiving.do("expect", run, path)
        self.receiving.begin("ready_at", run)
        began = self.sending.do("ship", run, path)
        return float(self.receiving.result() - began)

    def check(self, shape: Shape, measure: Measure) -> None:
        """Runs it once into a pool of zeros, and sees that everything came to where it belongs."""
        self.receiving.do("forget", shape.name, "bf16")
        measure()
        sent, received = (end.do("sums", shape.name, "bf16") for end in (self.sending, self.receiving))
        assert sent == received, f"{shape.name}: what arrived is not what was sent"


def gigabytes_per_s(case: str, seconds: Sequence[float]) -> Row:
    rates = [SHIPMENT_BYTES / s / 1e9 for s in seconds]
    return Row(case, "rate", "GB/s", statistics.median(rates), None, "", None, "", None, half_spread(rates))
