"""Which attached workers are hidden from placement because they fail (ejection.py), and who may not be. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from router.ejection import Circuit, Ejections
from router.views import Placement
from router.worker_handle import WorkerHandle

log = structlog.get_logger("router")


class Guard:
    """Invariant: an ejected worker is hidden exactly while its role has somebody else who could take work. `workers` is the fleet's own
    table."""

    def __init__(self, workers: Mapping[bytes, WorkerHandle], on_change: Callable[[], None]) -> None:
        self._workers = workers
        self._on_change = on_change
        self._ejections = Ejections(lambda: time.monotonic())

    def circuit(self, worker: WorkerHandle) -> Circuit:
        return self._ejections.state(worker.hello.worker_id)

    def attached(self, worker: WorkerHandle) -> None:
        self._ejections.attached(worker.hello.worker_id)
        self.look()

    def detached(self, worker: WorkerHandle, *, is_death: bool) -> None:
        if is_death:
            self._ejections.died(worker.hello.worker_id)
        self.look()

    def succeeded(self, placement: Placement) -> None:
        """An attempt ended well at these workers."""
        for incarnation in (placement.prefill, placement.decode):
            worker = self._workers.get(incarnation) if incarnation is not None else None
            if worker is not None:
                self._ejections.succeeded(worker.hello.worker_id)

    def failed(self, attempt: int, incarnations: Iterable[bytes]) -> None:
        """An attempt ended at these workers, by their fault."""
        for worker in filter(None, map(self._workers.get, incarnations)):
            if self._ejections.failed(worker.hello.worker_id, attempt):
                log.warning("worker ejected", worker_id=worker.hello.worker_id)
                self.look()

    def is_due(self, worker: WorkerHandle) -> bool:
        """Whether a canary is to be sent there now, for what is known against it; the next word on it is `probed`."""
        return self._ejections.is_due(worker.hello.worker_id)

    def probed(self, worker: WorkerHandle, *, is_ok: bool) -> None:
        """How a canary went."""
        self._ejections.probed(worker.hello.worker_id, is_ok=is_ok)
        self.look()

    def look(self) -> None:
        """Hides and shows. To be called when a worker came, went, fell silent or drains."""
        now, has_changed = time.monotonic(), False
        able = [worker for worker in self._workers.values() if worker.is_able(now)]
        roles_with_others = {worker.is_prefill for worker in able if self.circuit(worker) is Circuit.CLOSED}
        for worker in able:
            is_ejected = self.circuit(worker) is not Circuit.CLOSED and worker.is_prefill in roles_with_others
            if worker.is_ejected is not is_ejected:
                worker.is_ejected, has_changed = is_ejected, True
                worker.touch()
        if has_changed:
            self._on_change()
