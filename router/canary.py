"""Requests of the router's own: a few tokens in, one out, straight to one worker, to see whether it works. Event loop only.

`look` is called again and again: it sends what is due and gives up what has taken too long, so there is no task and nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from router.fleet import Fleet
from router.views import Placement
from router.worker_handle import PromptWork, WorkerHandle
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.wire import sampling_to_wire, stopping_to_wire
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
PROMPT = (1, 2, 3, 4)  # less than a block: it is never cached, so it is computed
TIMEOUT_S = 3.0
LOOK_EVERY_S = 0.2
IDLE_S = 10.0  # without work before a worker that nothing is known against is tried


class Canary:
    """One that is under way. Implements AttemptEvents."""

    num_choices = 1

    def __init__(self, worker: WorkerHandle, deadline: float, on_end: Callable[[Canary, bool | None], None]) -> None:
        self.worker = worker
        self.deadline = deadline
        self.attempt = 0
        self.has_token = False
        self._on_end = on_end

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None:
        self.has_token |= bool(output.token_ids)

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None:
        self._on_end(self, self.has_token)

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None:
        self._on_end(self, False)

    def on_lost(self, incarnation: bytes, *, is_death: bool) -> None:
        self._on_end(self, None)  # the fleet knows


class Canaries:
    """At most one for each worker. `tries_idle`: those that had no work for a while are tried too."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = time.monotonic, *, tries_idle: bool) -> None:
        self._fleet = fleet
        self._clock = clock
        self._tries_idle = tries_idle
        self._open: dict[bytes, Canary] = {}  # by incarnation
        self._look_at = 0.0

    def look(self) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        for canary in list(self._open.values()):
            if now >= canary.deadline:
                self._fleet.end(canary.attempt, canary.worker.incarnation, "canary over")
                self._end(canary, False)
        for worker in self._fleet.workers:
            if worker.incarnation not in self._open and worker.is_able(now):
                is_due = self._fleet.guard.is_due(worker)
                is_idle = not worker.attempts and now - worker.active_at >= IDLE_S
                if is_due or (self._tries_idle and is_idle and not worker.is_ejected):
                    self._send(worker, now)

    def _send(self, worker: WorkerHandle, now: float) -> None:
        canary = self._open[worker.incarnation] = Canary(worker, now + TIMEOUT_S, self._end)
        placement = Placement(worker.incarnation, None) if worker.is_prefill else Placement(None, worker.incarnation)
        canary.attempt = self._fleet.begin(placement, PromptWork(len(PROMPT), 0, worker.cost.seconds(len(PROMPT))), canary)
        worker.send(
            submit=fleet_pb2.Submit(
                attempt=canary.attempt,
                request_id=f"canary-{canary.attempt}",
                part=fleet_pb2.PART_PREFILL if worker.is_prefill else fleet_pb2.PART_WHOLE,
                prompt_token_ids=PROMPT,
                sampling=sampling_to_wire(SamplingParams(temperature=0.0)),
                stopping=stopping_to_wire(StopParams(max_tokens=1)),
                priority=inference_pb2.PRIORITY_SYSTEM,
            )
        )

    def _end(self, canary: Canary, is_ok: bool | None) -> None:
        """None: it cannot be known."""
        worker = canary.worker
        del self._open[worker.incarnation]
        self._fleet.end(canary.attempt, worker.incarnation, None)
        if is_ok is not None:
            say = log.debug if is_ok and not worker.is_ejected else log.info
            say("canary", worker_id=worker.hello.worker_id, is_ok=is_ok)
            self._fleet.guard.probed(worker, is_ok=is_ok)
