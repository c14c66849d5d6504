"""What routers gave this worker to do: taken or refused, waiting for a grammar, or with the service that owns it. io thread.

Whatever goes wrong with one job ends that job alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec

import structlog

from splitfire.core.errors import Exhausted, Internal, SplitfireError, Unavailable
from splitfire.core.wire import grammar_from_wire
from splitfire.engine.sequence import SeqId
from splitfire.engine.updates import StepResult
from splitfire.v1 import fleet_pb2
from splitfire.worker.context import GeneratingService, RoleService, SendingService
from splitfire.worker.grammars import GrammarDesk
from splitfire.worker.job import Job, JobLimits, Replies, handoff_from_wire, make_job, refusal
from splitfire.worker.load import OpenJobs
from splitfire.worker.role_change import RoleChanger

log = structlog.get_logger("worker")
P = ParamSpec("P")


class Jobs:
    """Between the links and the two role services. At most `max_jobs`; those of a worker that drains are its last."""

    def __init__(
        self, prefill: SendingService, decode: GeneratingService, grammars: GrammarDesk, role: RoleChanger, limits: JobLimits,
        max_jobs: int, num_missing: Callable[[list[SeqId]], int],
    ) -> None:  # fmt: skip
        self.is_draining = False
        self.open = OpenJobs(self._is_owned, num_missing)
        self._prefill = prefill
        self._decode = decode
        self._grammars = grammars
        self._role = role
        self._limits = limits
        self._max_jobs = max_jobs

    @property
    def num_jobs(self) -> int:
        return self._grammars.num_jobs + self._prefill.num_jobs + self._decode.num_jobs

    # -- from routers

    def submit(self, replies: Replies, submit: fleet_pb2.Submit) -> None:
        with _refusing(replies, submit.attempt):
            if self.is_draining:
                raise Unavailable("the worker is draining", reason="draining")
            self._role.refuse()
            if self.num_jobs >= self._max_jobs:
                raise Exhausted(f"the worker has {self.num_jobs} requests, limit {self._max_jobs}", reason="queue_full")
            job = make_job(submit, replies, self._limits, time.monotonic())
            if submit.HasField("grammar"):
                self._grammars.build(job, grammar_from_wire(submit.grammar), self._take)
            else:
                self._take(job)

    def cancel(self, replies: Replies, cancel: fleet_pb2.Cancel) -> None:
        choice = cancel.choice if cancel.HasField("choice") else None
        self._grammars.cancel(replies, cancel.attempt)  # several choices never wait for one
        for service in (self._prefill, self._decode):
            service.cancel(replies, cancel.attempt, choice)

    def router_lost(self, replies: Replies) -> None:
        """Nobody waits for its jobs any more."""
        for place in (self._grammars, self._prefill, self._decode):
            place.cancel(replies, None)

    def redirect(self, replies: Replies, redirect: fleet_pb2.Redirect) -> None:
        try:
            handoff = handoff_from_wire(redirect.handoff, self._limits.transport)
            self._prefill.redirect(replies, redirect.attempt, handoff)
        except SplitfireError as exc:
            self._prefill.cancel(replies, redirect.attempt)
            replies.refused(refusal(redirect.attempt, exc, is_retryable=exc.is_retryable))

    # -- from the engine

    def on_started(self, ids: tuple[SeqId, ...]) -> None:
        """The engine begins to compute these prompts."""
        self.open.begun(ids)
        for seq_id in ids:
            if (service := self._owner(seq_id)) is not None:
                self._guarded(service, seq_id, service.on_started, seq_id)

    def on_step(self, result: StepResult) -> None:
        """Every update to the service that owns its sequence."""
        for seq_id, offset, token_id in result.plain:
            self._guarded(self._decode, seq_id, self._decode.on_token, seq_id, offset, token_id)
        for update in result.events:
            if (service := self._owner(update.seq_id)) is not None:
                self._guarded(service, update.seq_id, service.on_update, update)

    # -- inside

    def _take(self, job: Job) -> None:
        with _refusing(job.replies, job.attempt):
            self._role.refuse()  # it may have begun to change while a grammar was built
            service = self._prefill if job.part == fleet_pb2.PART_PREFILL else self._decode
            service.submit(job)
            self.open.add(job)

    def _owner(self, seq_id: SeqId) -> RoleService | None:
        return next((service for service in (self._prefill, self._decode) if service.owns(seq_id)), None)

    def _is_owned(self, seq_id: SeqId) -> bool:
        return self._owner(seq_id) is not None

    def _guarded(self, service: RoleService, seq_id: SeqId, act: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """One request that cannot go on fails alone."""
        try:
            act(*args, **kwargs)
        except SplitfireError as exc:
            service.fail(seq_id, exc)
        except Exception as exc:
            log.exception("request failed")
            service.fail(seq_id, Internal(f"worker failed: {type(exc).__name__}"))


@contextlib.contextmanager
def _refusing(replies: Replies, attempt: int) -> Iterator[None]:
    """One bad request fails alone."""
    try:
        yield
    except SplitfireError as exc:
        replies.refused(refusal(attempt, exc, is_retryable=exc.is_retryable))
    except Exception as exc:
        log.exception("submit failed", attempt=attempt)
        replies.refused(refusal(attempt, Internal(f"submit failed: {type(exc).__name__}"), is_retryable=False))
