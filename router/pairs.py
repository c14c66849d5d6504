"""What prefill workers measured of the way to each decode worker, as this router was told; and measuring anew. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from splitfire.core import limits
from splitfire.core.machine import PATHS
from splitfire.v1 import fleet_pb2

MAX_RATE = 1e15  # bytes per second; more is no measurement
Ask = Callable[[bytes, bytes], None]  # tells a prefill worker to measure the way to a decode worker


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill worker and a decode worker, by incarnation."""

    prefill: bytes
    decode: bytes


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A measurement and when it was made, by this router's clock."""

    measured: fleet_pb2.PairMeasurement
    measured_at: float


@dataclass(eq=False)
class _Round:
    """One round of measuring. `awaited` are pairs that were asked and have not answered."""

    began: float
    awaited: dict[Pair, asyncio.Event] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class Pairs:
    """Invariant: a pair is known only while both its workers are attached."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Pair, KnownPair] = {}
        self._round: _Round | None = None
        self._ended = float("-inf")  # of the last round

    def items(self) -> Iterable[tuple[Pair, KnownPair]]:
        return self._known.items()

    def record(self, pair: Pair, measured: fleet_pb2.PairMeasurement) -> None:
        """What a worker reported; a round that waits for it goes on, unless it is older than the round."""
        now = self._clock()
        self._known[pair] = KnownPair(measured, now - measured.age_s)
        if self._round is not None and now - measured.age_s >= self._round.began:
            self._arrived(pair)

    def forget(self, incarnation: bytes) -> None:
        """The worker is gone."""
        for pair in [pair for pair in self._known if incarnation in (pair.prefill, pair.decode)]:
            del self._known[pair]
        for pair in list(self._round.awaited) if self._round is not None else ():
            if incarnation in (pair.prefill, pair.decode):
                self._arrived(pair)

    async def measure(self, pairs: Iterable[Pair], ask: Ask) -> None:
        """Returns when every pair was measured, or after MEASURE_TIMEOUT_S. Who comes during a round or within MEASURE_EVERY_S of
        its end shares it: nobody can keep the workers busy with measuring."""
        if self._round is None:
            if self._clock() - self._ended < limits.MEASURE_EVERY_S:
                return
            self._round = _Round(self._clock())
            self._round.task = asyncio.create_task(self._run(self._round, list(pairs), ask), name="measure-pairs")
        assert self._round.task is not None
        await asyncio.shield(self._round.task)  # the round goes on when one who waits for it hangs up

    async def _run(self, current: _Round, pairs: list[Pair], ask: Ask) -> None:
        """No worker takes part in two measurements at once, or each would measure the other."""
        busy = {pair.decode: asyncio.Lock() for pair in pairs}
        by_prefill: dict[bytes, list[Pair]] = {}
        for pair in pairs:
            by_prefill.setdefault(pair.prefill, []).append(pair)

        async def measure_from(mine: list[Pair], turn: int) -> None:
            for pair in mine[turn % len(mine) :] + mine[: turn % len(mine)]:  # not all at the same decode worker first
                async with busy[pair.decode]:
                    came = current.awaited[pair] = asyncio.Event()
                    ask(pair.prefill, pair.decode)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(limits.MEASURE_PAIR_S):
                            await came.wait()

        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.MEASURE_TIMEOUT_S), asyncio.TaskGroup() as group:
                    for turn, mine in enumerate(by_prefill.values()):
                        group.create_task(measure_from(mine, turn), name=f"measure-{mine[0].prefill.hex()[:6]}")
        finally:
            self._round, self._ended = None, self._clock()

    def _arrived(self, pair: Pair) -> None:
        event = self._round.awaited.pop(pair, None) if self._round is not None else None
        if event is not None:
            event.set()


def is_possible(measured: fleet_pb2.PairMeasurement) -> bool:
    """Whether a report can be true: finite, and in words that are known."""
    times = (measured.round_trip_s, measured.round_trip_p99_s, measured.age_s)
    rates = (measured.bytes_per_s, measured.memcpy_bytes_per_s)
    return (
        all(0 <= value < 1e9 for value in times)  # NaN fails this too
        and all(0 <= value < MAX_RATE for value in rates)
        and measured.path in PATHS
        and len(measured.transport) <= limits.MAX_TRANSPORT_CHARS
        and measured.transport.isprintable()
    )
