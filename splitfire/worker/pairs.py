"""The peers a worker has met, and what it measured of the way to each. io thread.

The prefill side measures: when the two meet, and when a router asks. What it finds goes to every router.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from kvtransfer.agent import TransferAgent
from kvtransfer.peers import PeerAddress
from kvtransfer.probe import PairRates
from splitfire.core.errors import Unavailable
from splitfire.core.machine import NETWORK
from splitfire.v1 import fleet_pb2

log = structlog.get_logger("worker")
RUNS = 3  # of one measurement; the fastest counts: the others were interrupted, and placement compares these numbers


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    """What was found out about the way to one peer, and when."""

    peer: PeerAddress
    transport: str
    rates: PairRates
    memcpy_bytes_per_s: float
    measured_at: float

    def to_wire(self, now: float) -> fleet_pb2.PairMeasurement:
        rates = self.rates
        return fleet_pb2.PairMeasurement(
            peer_incarnation=self.peer.incarnation, transport=self.transport, path=rates.path, round_trip_s=rates.round_trip_s,
            round_trip_p99_s=rates.round_trip_p99_s, bytes_per_s=rates.bytes_per_s, memcpy_bytes_per_s=self.memcpy_bytes_per_s,
            age_s=max(0.0, now - self.measured_at),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Met:
    """A peer of the other role."""

    address: PeerAddress
    is_same_host: bool


class PairMeasurer:
    """At most one measurement of a pair at a time."""

    def __init__(
        self,
        agent: TransferAgent,
        memcpy_bytes_per_s: float,
        on_measured: Callable[[MeasuredPair], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent = agent
        self._memcpy_bytes_per_s = memcpy_bytes_per_s
        self._on_measured = on_measured
        self._clock = clock
        self._met: dict[bytes, _Met] = {}
        self._runs: dict[bytes, list[PairRates]] = {}  # of those that are measured now

    def meet(self, address: PeerAddress, *, is_same_host: bool) -> None:
        """Measures a peer that was not here before."""
        if address.incarnation not in self._met:
            self._met[address.incarnation] = _Met(address, is_same_host)
            self.measure(address.incarnation)

    def measure(self, incarnation: bytes) -> None:
        """Once more; nothing happens when that is under way, or the peer is not here any more."""
        met = self._met.get(incarnation)
        if met is not None and incarnation not in self._runs:
            self._runs[incarnation] = []
            self._run(met)

    def part(self, incarnation: bytes) -> None:
        self._met.pop(incarnation, None)
        self._runs.pop(incarnation, None)

    def _run(self, met: _Met) -> None:
        try:
            self._agent.measure(met.address, partial(self._ran, met))
        except Unavailable as exc:
            self._runs.pop(met.address.incarnation, None)
            log.warning("cannot measure", peer=met.address.worker_id, reason=str(exc))

    def _ran(self, met: _Met, rates: PairRates) -> None:
        runs = self._runs.get(met.address.incarnation)
        if runs is None:  # the peer is gone
            return
        runs.append(rates)
        if len(runs) < RUNS:
            self._run(met)
        else:
            del self._runs[met.address.incarnation]
            self._found(met, max(runs, key=lambda run: run.bytes_per_s))

    def _found(self, met: _Met, rates: PairRates) -> None:
        name, peer = self._agent.transport.name, met.address.worker_id
        log.info(
            "pair",
            peer=peer,
            transport=name,
            path=rates.path,
            round_trip_us=round(rates.round_trip_s * 1e6),
            gb_per_s=round(rates.bytes_per_s / 1e9, 2),
        )
        if met.is_same_host and rates.path == NETWORK:
            log.warning("KV between two workers of this host goes over the network", peer=peer, advice="splitfire doctor says why")
        self._on_measured(MeasuredPair(met.address, name, rates, self._memcpy_bytes_per_s, self._clock()))
