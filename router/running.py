"""What runs: choices, counted for all and for each tenant, which may have a quota. Pure."""

from __future__ import annotations

from router.bounds import part_of
from router.waiting import BATCH, INTERACTIVE, STANDARD, SYSTEM

RUNNING_PERCENT = {
    BATCH: 75,
    STANDARD: 95,
    INTERACTIVE: 100,
    SYSTEM: 100,
}  # of the bound: as long as less runs, one of the class may start


class Running:
    """A ticket may exceed bound and quota by its other choices."""

    def __init__(self, max_running: int) -> None:
        self.num = 0
        self.max_running = max_running
        self._bounds = {level: part_of(max_running, percent) for level, percent in RUNNING_PERCENT.items()}
        self._by_tenant: dict[str, int] = {}  # of those that have any
        self._quotas: dict[str, int] = {}

    def set_quota(self, tenant: str, quota: int | None) -> None:
        if quota is not None:
            self._quotas[tenant] = quota
        else:
            self._quotas.pop(tenant, None)

    def is_full(self, level: int) -> bool:
        """Then it is for those below, too."""
        return self.num >= self._bounds[level]

    def is_at_quota(self, tenant: str) -> bool:
        return tenant in self._quotas and self._by_tenant.get(tenant, 0) >= self._quotas[tenant]

    def add(self, tenant: str, num_choices: int) -> None:
        self.num += num_choices
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + num_choices

    def end(self, tenant: str) -> None:
        self.num -= 1
        self._by_tenant[tenant] -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
