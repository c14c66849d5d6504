"""Moves workers between the roles as roles.py says. Event loop only."""

from __future__ import annotations

import math
import time

import structlog

from router.admission import Admission
from router.fleet import Fleet
from router.placing import Room
from router.roles import RolePolicy, WorkerUse
from router.views import Scan
from router.worker_handle import WorkerHandle
from splitfire.core.errors import SplitfireError
from splitfire.v1 import inference_pb2

log = structlog.get_logger("router")
LOOK_EVERY_S = 0.5


class Rebalancer:
    """`look` is called again and again."""

    def __init__(self, fleet: Fleet, admission: Admission[Scan, Room], ttft_target_s: float) -> None:
        self._fleet = fleet
        self._admission = admission
        self._policy = RolePolicy(ttft_target_s)
        self._look_at = 0.0

    def look(self) -> None:
        now, rate = time.monotonic(), self._admission.rate_tokens_per_s
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        queued_s = self._admission.queued_tokens / rate if rate > 0 else 0.0
        change = self._policy.look(now, [_use_of(worker, now) for worker in self._fleet.workers if worker.is_able(now)], queued_s)
        worker = self._fleet.worker(change.incarnation) if change is not None else None
        if change is None or worker is None:
            return
        role = inference_pb2.ROLE_PREFILL if change.to_prefill else inference_pb2.ROLE_DECODE
        try:
            self._fleet.change_role(worker.hello.worker_id, role)
        except SplitfireError as exc:
            log.warning("role not changed", worker_id=worker.hello.worker_id, detail=str(exc))


def _use_of(worker: WorkerHandle, now: float) -> WorkerUse:
    view, load = worker.view(now), worker.load
    if worker.is_prefill:
        used = 1.0 if view.queue or view.other_queue_s else 0.0
    else:
        used = max(view.num_running / view.max_running, 1.0 - load.free_blocks / max(1, load.total_blocks))
    return WorkerUse(worker.incarnation, worker.is_prefill, view.num_running, view.wait_s(math.inf, now), used)
