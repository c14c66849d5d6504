"""Who of one class is next: of the tenants the one that got least, of its tickets the one with the least key. Pure.

What a tenant got is its virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): the tokens of prompts
that started, and OUTPUT_COST times those that came out, over its weight. Who comes back from having nothing waiting starts at the least
of those who wait: nobody saves up. So two tenants that always wait differ by at most 2 * (the largest prompt + OUTPUT_COST * what
one of them may still have to come out) over the lesser weight, whatever the sizes of their requests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heapreplace
from operator import attrgetter

OUTPUT_COST = 2  # tokens of a prompt that one token out is worth
_KEY = attrgetter("key")


@dataclass(frozen=True, slots=True)
class Place:
    """One ticket that waits: what its order and the bounds of the queue depend on."""

    number: int  # tickets are counted as they come
    tenant: str
    weight: float
    priority: int
    is_resumed: bool
    num_tokens: int
    num_bytes: int
    arrived: float
    expires_at: float
    key: tuple[float, int]  # ends with the number: no two are equal


@dataclass(slots=True)
class _Backlog:
    """What one tenant has waiting, least key first. Never empty in between."""

    weight: float
    places: list[Place] = field(default_factory=list)
    num_tokens: int = 0


class FairOrder:
    """What waits in one class. A counter outlives what its tenant has waiting; there are as many as tenants, whom the operator names."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._counters: dict[str, float] = {}
        self._backlogs: dict[str, _Backlog] = {}
        self._order: list[tuple[float, str]] = []  # counters of those that have something waiting, sorted
        self._last_left = ""

    def add(self, place: Place) -> None:
        tenant = place.tenant
        backlog = self._backlogs.get(tenant)
        if backlog is None:
            backlog = self._backlogs[tenant] = _Backlog(place.weight)
            least = self._order[0][0] if self._order else self._counters.get(self._last_left, 0.0)
            counter = self._counters[tenant] = max(self._counters.get(tenant, 0.0), least)
            insort(self._order, (counter, tenant))
        backlog.weight = place.weight
        insort(backlog.places, place, key=_KEY)
        backlog.num_tokens += place.num_tokens
        self.num_tokens += place.num_tokens

    def remove(self, place: Place) -> None:
        tenant = place.tenant
        backlog = self._backlogs[tenant]
        del backlog.places[bisect_left(backlog.places, place.key, key=_KEY)]
        backlog.num_tokens -= place.num_tokens
        self.num_tokens -= place.num_tokens
        if not backlog.places:
            del self._backlogs[tenant]
            self._forget_order(tenant)
            self._last_left = tenant

    def charge(self, tenant: str, tokens: float) -> None:
        """The tenant got `tokens`, already divided by its weight."""
        is_waiting = tenant in self._backlogs
        if is_waiting:
            self._forget_order(tenant)
        counter = self._counters[tenant] = self._counters.get(tenant, 0.0) + tokens
        if is_waiting:
            insort(self._order, (counter, tenant))

    def in_order(self, is_held: Callable[[str], bool]) -> Iterator[Place]:
        """As they start if all can. One that is passed counts for those after it as if it had started, so that tenants take turns. The
        queue may change meanwhile. Tenants that are `is_held` are left out."""
        turns = list(self._order)  # sorted, so a heap
        seen: dict[str, tuple[float, int]] = {}
        while turns:
            counter, tenant = turns[0]
            backlog = self._backlogs.get(tenant)
            places = backlog.places if backlog is not None and not is_held(tenant) else []
            at = bisect_right(places, seen[tenant], key=_KEY) if tenant in seen else 0
            if at == len(places):
                heappop(turns)
                continue
            place = places[at]
            seen[tenant] = place.key
            heapreplace(turns, (counter + place.num_tokens / place.weight, tenant))
            yield place

    def tokens_before(self, place: Place) -> float:
        """Of tickets in the queue that start before one of them: its tenant's own, and of each other tenant what it gets until this
        one's turn comes."""
        mine = self._backlogs[place.tenant]
        own = sum(p.num_tokens for p in mine.places[: bisect_left(mine.places, place.key, key=_KEY)])
        turn = self._counters[place.tenant] + own / place.weight
        others = 0.0
        for tenant, backlog in self._backlogs.items():
            lead = turn - self._counters[tenant]
            if tenant != place.tenant and lead > 0:
                others += min(backlog.num_tokens, lead * backlog.weight)
        return own + others

    def _forget_order(self, tenant: str) -> None:
        del self._order[bisect_left(self._order, (self._counters[tenant], tenant))]
