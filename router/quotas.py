"""What each tenant may still use: requests that are open, tokens a minute. Where several routers share a bound, each has its part. Pure.

A bucket holds a minute's tokens at most. A request is let in when there is any token in it; its prompt is taken out at once,
its output when it ends, and what is then missing the next requests wait for: so over the minutes nobody gets more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.tenants import Tenant
from splitfire.core.errors import Exhausted

MINUTE_S = 60.0
ROUNDING = 1e-6  # tokens
UNKNOWN_WAIT_S = 1.0


@dataclass(slots=True)
class Bucket:
    """Tokens that were left at an instant; below 0: owed."""

    level: float
    at: float


class Quotas:
    """Buckets of tenants that have a bound, one for each that ever had, and counts of those that have a request open."""

    def __init__(self, clock: Callable[[], float], num_routers: Callable[[], int]) -> None:
        self._clock = clock
        self._num_routers = num_routers  # that share every bound
        self._buckets: dict[str, Bucket] = {}
        self._num_open: dict[str, int] = {}

    @contextmanager
    def opened(self, tenant: Tenant) -> Iterator[None]:
        """A request is open within. Exhausted, with the time until it can be, when the tenant has none left or no token."""
        self._require_room(tenant)
        self._require_tokens(tenant)
        self._num_open[tenant.name] = self._num_open.get(tenant.name, 0) + 1
        try:
            yield
        finally:
            self._num_open[tenant.name] -= 1
            if not self._num_open[tenant.name]:
                del self._num_open[tenant.name]

    def spend(self, tenant: Tenant, num_tokens: int) -> None:
        """They were used, whether or not they were there."""
        if tenant.tokens_per_minute is not None:
            self._bucket(tenant).level -= num_tokens

    def part(self, bound: int | None) -> int | None:
        """This router's, of a bound that is not 0 at least one."""
        return bound if not bound else max(1, bound // self._num_sharing)

    @property
    def _num_sharing(self) -> int:
        return max(1, self._num_routers())

    def _require_room(self, tenant: Tenant) -> None:
        running, queued = self.part(tenant.max_running), self.part(tenant.max_queued)
        num_open = self._num_open.get(tenant.name, 0)
        if running is not None and queued is not None and num_open >= running + queued:
            message = (
                f"{num_open} requests of this tenant are open, limit {running + queued}: {running} that run and {queued} that wait"
            )
            raise Exhausted(message, reason="tenant_quota", retry_after_s=UNKNOWN_WAIT_S)

    def _require_tokens(self, tenant: Tenant) -> None:
        if tenant.tokens_per_minute is None:
            return
        bucket, capacity = self._bucket(tenant), self._capacity(tenant)
        needed = min(1.0, capacity)
        if bucket.level < needed - ROUNDING:
            wait_s = math.ceil((needed - bucket.level) * MINUTE_S / capacity * 1000) / 1000
            message = (
                f"{capacity:g} tokens a minute are used up, and {needed - bucket.level:.0f} more; there are some in {wait_s:g} s"
            )
            raise Exhausted(message, reason="tenant_quota", retry_after_s=wait_s)

    def _capacity(self, tenant: Tenant) -> float:
        """Tokens a minute, of this router."""
        return (tenant.tokens_per_minute or 0) / self._num_sharing

    def _bucket(self, tenant: Tenant) -> Bucket:
        """Filled up to now."""
        now, capacity = self._clock(), self._capacity(tenant)
        bucket = self._buckets.setdefault(tenant.name, Bucket(capacity, now))
        bucket.level = min(capacity, bucket.level + (now - bucket.at) * capacity / MINUTE_S)
        bucket.at = now
        return bucket
