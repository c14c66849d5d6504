"""Who gets no work for a while: workers at which attempts fail one after another, and those that die as soon as they are there. Pure.

By name, not by incarnation: what is started again under a name is most likely what failed before. An ejected worker gets one request of
the router's own when its time has come (canary.py), and work when that succeeds (outlier ejection as in Envoy, half-open). Whether a
worker can be missed is not known here: the last of a role gets work whatever its circuit says (fleet.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from router.retries import MOVES, WorkerLost
from splitfire.core import limits
from splitfire.core.errors import Internal, SplitfireError
from splitfire.core.lifecycle import advance

MAX_FAILED = 5  # attempts, one after another
EJECTED_S, MAX_EJECTED_S = 30.0, 300.0  # the first time; n times so long the n-th
FORGIVEN_EVERY_S = 60.0  # one ejection, while the worker gets work
EARLY_S = 60.0  # a death so soon after it was given work is one of a crash loop
MAX_EARLY_DEATHS = 2  # one after another: one may be anybody's doing
MAX_BACKOFF_S = 60.0
MAX_NAMES = 4 * limits.MAX_WORKERS  # remembered; the one not heard of for longest goes first


class Circuit(Enum):
    """Between the router's queue and one worker."""

    CLOSED = "closed"  # gets work
    EJECTED = "ejected"  # gets none
    PROBING = "probing"  # gets a canary


class CircuitEvent(Enum):
    """What can happen to it."""

    EJECT = "eject"  # failed too often, or died too soon
    TIME = "time"  # it was out for long enough
    PROBE_OK = "probe ok"
    PROBE_FAILED = "probe failed"


CIRCUIT: dict[Circuit, dict[CircuitEvent, Circuit]] = {
    Circuit.CLOSED: {CircuitEvent.EJECT: Circuit.EJECTED},
    Circuit.EJECTED: {CircuitEvent.EJECT: Circuit.EJECTED, CircuitEvent.TIME: Circuit.PROBING},
    Circuit.PROBING: {
        CircuitEvent.EJECT: Circuit.EJECTED,
        CircuitEvent.PROBE_OK: Circuit.CLOSED,
        CircuitEvent.PROBE_FAILED: Circuit.EJECTED,
    },
}


def is_workers_fault(error: SplitfireError) -> bool:
    """Whether an attempt that ended so speaks against its worker. A death is counted by itself."""
    is_no_fault = isinstance(error, WorkerLost) or error.reason in MOVES
    return not is_no_fault and (error.is_retryable or isinstance(error, Internal))


@dataclass(slots=True)
class _Record:
    """One name."""

    state: Circuit = Circuit.CLOSED
    num_failed: int = 0  # attempts, since the last that succeeded
    last_failed: int = 0  # its number: an attempt of several choices fails once
    num_ejections: int = 0  # that are not forgiven yet
    num_early_deaths: int = 0  # since it last lived for long enough
    attached_at: float = 0.0
    closed_at: float = 0.0
    probe_at: float = 0.0


class Ejections:
    """The circuit of every worker's name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def state(self, name: str) -> Circuit:
        record = self._records.get(name)
        return record.state if record is not None else Circuit.CLOSED

    def attached(self, name: str) -> None:
        record = self._record(name)
        record.attached_at = self._clock()
        if record.state is Circuit.PROBING:  # its canary went with the stream before
            self._move(record, CircuitEvent.EJECT)

    def died(self, name: str) -> None:
        """Not on purpose."""
        record, now = self._record(name), self._clock()
        is_early = record.state is not Circuit.CLOSED or now - max(record.attached_at, record.closed_at) < EARLY_S
        record.num_early_deaths = record.num_early_deaths + 1 if is_early else 0
        if record.num_early_deaths >= MAX_EARLY_DEATHS:
            self._move(record, CircuitEvent.EJECT)
            record.probe_at = now + min(MAX_BACKOFF_S, 2.0 ** min(record.num_early_deaths - 1, 10))
        elif record.state is Circuit.PROBING:
            self._eject(record, CircuitEvent.PROBE_FAILED)

    def succeeded(self, name: str) -> None:
        """An attempt ended well at it."""
        record = self._records.get(name)
        if record is not None:
            record.num_failed = 0

    def failed(self, name: str, attempt: int) -> bool:
        """An attempt failed at it; whether that ejects it."""
        record = self._record(name)
        if record.state is not Circuit.CLOSED or record.last_failed == attempt:
            return False
        record.last_failed = attempt
        record.num_failed += 1
        if record.num_failed < MAX_FAILED:
            return False
        self._eject(record, CircuitEvent.EJECT)
        return True

    def is_due(self, name: str) -> bool:
        """Whether it is to be probed now; then it is being probed, and `probed` says how that went."""
        record = self._records.get(name)
        if record is None or record.state is not Circuit.EJECTED or self._clock() < record.probe_at:
            return False
        self._move(record, CircuitEvent.TIME)
        return True

    def probed(self, name: str, *, is_ok: bool) -> None:
        """How a canary went. One that fails at a worker that has given no cause ejects it."""
        record = self._record(name)
        if record.state is Circuit.PROBING and is_ok:
            self._move(record, CircuitEvent.PROBE_OK)
            record.closed_at, record.num_failed = self._clock(), 0
        elif record.state is Circuit.PROBING:
            self._eject(record, CircuitEvent.PROBE_FAILED)
        elif record.state is Circuit.CLOSED and not is_ok:
            self._eject(record, CircuitEvent.EJECT)

    # -- inside

    def _record(self, name: str) -> _Record:
        record = self._records.pop(name, None) or _Record()
        self._records[name] = record  # the last
        while len(self._records) > MAX_NAMES:
            del self._records[next(iter(self._records))]
        return record

    def _eject(self, record: _Record, event: CircuitEvent) -> None:
        now = self._clock()
        if record.state is Circuit.CLOSED:
            record.num_ejections = max(0, record.num_ejections - int((now - record.closed_at) / FORGIVEN_EVERY_S))
        self._move(record, event)
        record.num_ejections += 1
        record.probe_at = now + min(MAX_EJECTED_S, EJECTED_S * record.num_ejections)

    def _move(self, record: _Record, event: CircuitEvent) -> None:
        record.state = advance(CIRCUIT, record.state, event)
