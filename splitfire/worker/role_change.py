"""A worker takes on the other role while it runs: nothing new, what only waits goes back, the rest gets a while. io thread.

1. Routers see it drain, and are refused with `role_change`, which they take as "elsewhere".
2. What has not begun is given back at once; prompts, hand-offs and sequences that run get the grace time.
3. What is left then is given back too, prompts between two chunks; routers go on elsewhere, with the tokens that were streamed.
4. It attaches again to all routers, as the same incarnation with the other role. To peers it was gone and is there again.

Drafters are those it was started with: a worker that was started as prefill generates without drafts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Literal, Protocol, TypeAlias

import structlog

from splitfire.core import limits
from splitfire.core.errors import Unavailable
from splitfire.v1 import inference_pb2
from splitfire.worker.context import RoleService
from splitfire.worker.routers import Routers

log = structlog.get_logger("worker")
RoleName: TypeAlias = Literal["prefill", "decode"]
ROLES: dict[RoleName, inference_pb2.Role.ValueType] = {
    "prefill": inference_pb2.ROLE_PREFILL,
    "decode": inference_pb2.ROLE_DECODE,
}
MAX_GRACE_S = 600.0
TOLD_S = 0.2  # until every router has been told that the worker drains
LOOK_EVERY_S = 0.02


class WorkerInside(Protocol):
    """What changes, and what has to be over first."""

    @property
    def num_busy(self) -> int:
        """Jobs and transfers that are open."""

    def report_now(self) -> None: ...


class RoleChanger:
    """Which role a worker has. `role` changes once nothing of the old one is left."""

    def __init__(self, role: RoleName, worker: WorkerInside, routers: Routers, services: Iterable[RoleService]) -> None:
        self.role = role
        self._worker = worker
        self._routers = routers
        self._services = tuple(services)
        self._next: RoleName | None = None

    @property
    def is_changing(self) -> bool:
        return self._next is not None

    @property
    def wire_role(self) -> inference_pb2.Role.ValueType:
        return ROLES[self.role]

    def begin(self, role: int, grace_s: float) -> bool:
        """Whether `run` is to be called: not when the worker has the role, or is changing already."""
        new = next((name for name, number in ROLES.items() if number == role), None)
        if new is None or new == self.role or self.is_changing:
            log.warning("role not changed", role=self.role, asked=role, is_changing=self.is_changing)
            return False
        self._next = new
        log.info("changing role", role=new, busy=self._worker.num_busy, grace_s=grace_s)
        return True

    async def run(self, grace_s: float) -> None:
        """Takes at most `grace_s` and a little for transfers to be broken off in order."""
        assert self._next is not None
        self._worker.report_now()
        self._give_back(only_waiting=True)
        await asyncio.sleep(TOLD_S)
        await self._until_idle(min(grace_s, MAX_GRACE_S) if grace_s > 0 else 0.0)  # NaN is not more than 0
        self._give_back(only_waiting=False)
        await self._until_idle(limits.PROGRESS_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.PROGRESS_S):
                await self._routers.flush()
        self.role, self._next = self._next, None
        self._routers.attach_again()
        log.info("role changed", role=self.role)

    def refuse(self) -> None:
        """Unavailable while it changes."""
        if self.is_changing:
            raise Unavailable("the worker takes on another role", reason="role_change")

    def _give_back(self, *, only_waiting: bool) -> None:
        error = Unavailable("the worker takes on another role", reason="role_change")
        for link in self._routers:
            for service in self._services:
                service.give_back(link, error, only_waiting=only_waiting)

    async def _until_idle(self, seconds: float) -> None:
        for _ in range(int(seconds / LOOK_EVERY_S)):
            if not self._worker.num_busy:
                return
            await asyncio.sleep(LOOK_EVERY_S)
