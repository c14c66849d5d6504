"""When a worker should do the other role's work: one side starves while the other could spare one. Pure; `--rebalance` turns it on.

What is seen for WINDOW_S has to say the same all the time, and must leave the side that gives enough: so a load that both sides share,
or that swings, moves nobody. Nothing is moved within PAUSE_S of any change of who is there: where several routers look at the same
workers, the first that moves one stops the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 10.0
PAUSE_S = 30.0
STARVED = 0.25  # of the target for the first token: a prompt waits longer
AT_REST = 0.05  # of the same: it hardly waits
SPARE = 0.5  # of lanes and of KV in use at most, of decode workers that could give one
FULL = 0.9  # of lanes or of KV in use at least, of decode workers that want one
FULL_AFTER = 0.8  # what the side that gives may come to


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """How busy one worker is. `used`: of a decode worker the share of its lanes or of its KV, whichever is more; of a prefill worker 1
    while it has a prompt to compute, else 0."""

    incarnation: bytes
    is_prefill: bool
    num_running: int
    wait_s: float  # of the next prompt
    used: float


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A worker that is to take on the other role."""

    incarnation: bytes
    to_prefill: bool


@dataclass(frozen=True, slots=True)
class _Sample:
    """Both sides at a moment; means of their use."""

    at: float
    prefill_wait_s: float
    prefill_used: float
    decode_used: float


class RolePolicy:
    """Looks at the fleet again and again."""

    def __init__(self, ttft_target_s: float) -> None:
        self._target_s = ttft_target_s
        self._samples: deque[_Sample] = deque()
        self._known: frozenset[tuple[bytes, bool]] = frozenset()
        self._not_before = 0.0

    def look(self, now: float, workers: Sequence[WorkerUse], queued_s: float) -> RoleChange | None:
        """Who should change now, of those that can take work. `queued_s`: what prompts that wait in the router take the whole fleet."""
        known = frozenset((worker.incarnation, worker.is_prefill) for worker in workers)
        if known != self._known:
            self._known, self._not_before = known, now + PAUSE_S
            self._samples.clear()
        prefills = [worker for worker in workers if worker.is_prefill]
        decodes = [worker for worker in workers if not worker.is_prefill]
        if not prefills or not decodes:
            return None
        wait_s = min(worker.wait_s for worker in prefills) + queued_s
        self._samples.append(_Sample(now, wait_s, _mean_used(prefills), _mean_used(decodes)))
        while len(self._samples) > 1 and self._samples[1].at <= now - WINDOW_S:
            self._samples.popleft()
        if now < self._not_before or self._samples[0].at > now - WINDOW_S:
            return None
        if all(map(self._prefill_starves, self._samples)):
            return self._take(now, decodes, [sample.decode_used for sample in self._samples], to_prefill=True)
        if all(map(self._decode_starves, self._samples)):
            return self._take(now, prefills, [sample.prefill_used for sample in self._samples], to_prefill=False)
        return None

    def _prefill_starves(self, sample: _Sample) -> bool:
        return sample.prefill_wait_s > STARVED * self._target_s and sample.decode_used < SPARE

    def _decode_starves(self, sample: _Sample) -> bool:
        return sample.prefill_wait_s < AT_REST * self._target_s and sample.decode_used > FULL

    def _take(self, now: float, givers: Sequence[WorkerUse], used: Sequence[float], *, to_prefill: bool) -> RoleChange | None:
        """The least busy one, if the others can do without."""
        num_left = len(givers) - 1
        if not num_left or sum(used) / len(used) * len(givers) / num_left > FULL_AFTER:
            return None
        self._not_before = now + PAUSE_S
        self._samples.clear()
        return RoleChange(min(givers, key=lambda worker: (worker.num_running, worker.incarnation)).incarnation, to_prefill)


def _mean_used(workers: Sequence[WorkerUse]) -> float:
    return sum(worker.used for worker in workers) / len(workers)
