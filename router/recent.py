"""The latest requests and where their time went, for who asks a minute later. Event loop only. Memory: MAX_RECENT summaries of about
2 KiB each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from router.ended import Ended
from splitfire.v1 import inference_pb2 as pb

MAX_RECENT = 1000


class Recent:
    """Newest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: deque[Ended] = deque(maxlen=MAX_RECENT)

    def add(self, ended: Ended) -> None:
        self._kept.appendleft(ended)

    def find(self, name: str, tenant: str | None) -> list[Ended]:
        """By request id or trace id; of one tenant, or (None) of all."""
        return [one for one in self._of(tenant) if name in (one.summary.request_id, one.summary.trace_id)]

    def latest(self, count: int, tenant: str | None) -> Sequence[Ended]:
        return self._of(tenant)[:count]

    def slowest(self, count: int, tenant: str | None) -> Sequence[Ended]:
        """To the first token: those that have not got there took all their time for it."""
        return sorted(self._of(tenant), key=lambda one: one.summary.first_token_s or one.duration_s, reverse=True)[:count]

    def describe(self, ended: Ended) -> pb.RequestTrace:
        return pb.RequestTrace(
            summary=ended.summary,
            tenant=ended.tenant,
            outcome=ended.outcome,
            duration_s=ended.duration_s,
            age_s=self._clock() - ended.ended_at,
        )

    def _of(self, tenant: str | None) -> list[Ended]:
        return [one for one in self._kept if tenant in (None, one.tenant)]
