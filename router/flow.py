"""Admit, dispatch, recover: every choice of a request runs here, attempt by attempt. Event loop only.

One path for whatever interrupts an attempt (a worker died, a hand-off failed, no room): it is submitted again elsewhere
with the ids already streamed. Sampling is a function of (seed, choice, position), so the answer does not change.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from itertools import count
from random import Random

import structlog

from router.admission import Admission, Ticket
from router.attempt import Attempt
from router.choice import Choice
from router.describe import cost_attributes
from router.dispatch import send, send_again
from router.ejection import is_workers_fault
from router.first_attempt import FirstAttempt
from router.fleet import Fleet
from router.placement import missing_role
from router.placing import Placing, Room
from router.retries import Next, RetryBudget
from router.views import Placement, Scan
from splitfire.core.errors import DeadlineExceeded, SplitfireError, Unavailable
from splitfire.core.lifecycle import Req, ReqEvent
from splitfire.core.telemetry import Attributes, Telemetry
from splitfire.v1 import inference_pb2

log = structlog.get_logger("router")


class Flow:
    """Runs choices to their end. Event loop only."""

    def __init__(
        self, fleet: Fleet, admission: Admission[Scan, Room], placing: Placing, telemetry: Telemetry, vocab_size: int
    ) -> None:
        self.fleet = fleet
        self.admission = admission
        self.placing = placing
        self._telemetry = telemetry
        self._vocab_size = vocab_size
        self._random = Random(secrets.randbits(64))
        self._retries = RetryBudget()

    def first_attempt(self, choices: Sequence[Choice]) -> FirstAttempt | None:
        """For `run` of each of these; None: a choice that is the only one has nothing to share, and a grammar belongs to one sequence."""
        is_shared = len(choices) > 1 and choices[0].plan.grammar is None
        return FirstAttempt(choices, self._admit, self._abandon) if is_shared else None

    async def run(self, choice: Choice, first: FirstAttempt | None = None) -> None:
        """Returns when the choice is done; raises what the client is to be told. Cancelling it cancels the work. Its `first` attempt
        may be one with other choices; whatever interrupts that, it goes on by itself."""
        try:
            await self._run(choice, first)
        except asyncio.CancelledError:
            choice.advance(ReqEvent.CANCEL)
            raise
        except Exception:
            if choice.is_finished:  # a stop string was found meanwhile: the answer is complete
                choice.advance(ReqEvent.FINISH)
                return
            choice.advance(ReqEvent.FAIL)
            raise
        finally:
            if choice.tries.is_alone:
                self.fleet.release(choice)

    async def _run(self, choice: Choice, first: FirstAttempt | None) -> None:
        self._retries.offered()
        tries = choice.tries
        for number in count():
            if number:
                await asyncio.sleep(self._random.uniform(0, tries.backoff_s))
                if choice.is_finished:  # the client's reading caught up with a stop string meanwhile
                    choice.advance(ReqEvent.FINISH)
                    return
                choice.advance(ReqEvent.RESUBMIT)
            admitting = self._admit([choice]) if first is None or number else first.get(choice)
            error = await self._attempt(choice, admitting)
            if error is None or choice.is_finished:
                choice.advance(ReqEvent.FINISH)
                return
            choice.timeline.interrupted(time.monotonic())
            following = tries.after(error, self._retries)
            log.warning(
                "attempt failed",
                request_id=choice.plan.request_id,
                reason=error.reason,
                next=following.value,
                streamed=len(choice.ids),
            )
            if error.is_retryable and choice.has_ended:  # its worker died between the last token and saying so
                is_length = choice.ids[-1] not in choice.plan.stopping.stop_token_ids
                choice.finish(inference_pb2.FINISH_REASON_LENGTH if is_length else inference_pb2.FINISH_REASON_STOP)
                choice.advance(ReqEvent.FINISH)
                return
            if following is Next.GIVE_UP:
                raise tries.verdict(error)

    async def _attempt(self, choice: Choice, admitting: Awaitable[Attempt | None]) -> SplitfireError | None:
        """One try, from admission to its end; None: finished. Whatever happens, nothing of it is left at any worker."""
        attempt = await admitting
        if attempt is None:
            return None
        failed_before = frozenset(choice.failed_at)
        try:
            if choice.is_finished:
                return None
            if not attempt.is_dispatched and attempt.choices:  # a worker may have gone since it was placed
                self._dispatch(attempt)
            ended = attempt.ended(choice)
            await asyncio.wait((ended,), timeout=max(0.0, choice.plan.deadline - time.monotonic()))
            if not ended.done():
                stage = "decode" if choice.ids else "prefill"
                raise DeadlineExceeded(f"the deadline passed after {len(choice.ids)} tokens", reason=stage)
            error = ended.result()
            if error is None:
                self.fleet.guard.succeeded(attempt.placement)
            elif is_workers_fault(error):
                self.fleet.guard.failed(attempt.number, choice.failed_at - failed_before)
            return error
        finally:
            attempt.leave(choice, None, "request over")
            self.admission.ended(choice.plan.tenant)

    async def _admit(self, choices: list[Choice]) -> Attempt | None:
        """Waits for a place; the attempt is counted at its workers when this returns. None: it is not wanted any more. Of several
        choices some may go meanwhile, never the last."""
        choice, plan = choices[0], choices[0].plan
        if (reason := missing_role(self.fleet.scan().workers, self.placing.rules)) is not None:
            raise Unavailable(f"no {reason.removeprefix('no_')} worker is attached", reason=reason, retry_after_s=1.0)
        placed: asyncio.Future[Attempt | None] = asyncio.get_running_loop().create_future()

        def start(room: Room) -> int:
            attempt = Attempt(choices, room, self.fleet, self._vocab_size, self._redirect)
            attempt.charge = partial(self.admission.charge, ticket)
            for one in choices:
                one.end_attempt = partial(attempt.leave, one, None)
                if one.state is Req.ACCEPTED:
                    one.advance(ReqEvent.ADMIT)
            placed.set_result(attempt)
            return len(choices)

        for one in choices:
            one.timeline.queued(time.monotonic())
        work = self.placing.least_work(choice)
        ticket: Ticket[Scan, Room] = Ticket(
            tenant=plan.tenant,
            weight=plan.weight,
            priority=plan.priority,
            num_tokens=work.num_tokens - work.num_cached,
            num_bytes=4 * (len(plan.prompt) + len(plan.predicted)),
            work_s=work.seconds,
            deadline=plan.deadline,
            is_resumed=bool(choice.ids) or choice.tries.num_deaths + choice.tries.num_moves > 0,
            max_running=plan.max_running,
            find_room=lambda scan: self.placing.find(scan, choices),
            start=start,
            expire=placed.set_exception,
        )

        def stop_waiting(_reason: str) -> None:
            self.admission.withdraw(ticket)
            if not placed.done():
                placed.set_result(None)

        if len(choices) == 1:  # several have no text yet that could end them
            choice.end_attempt = stop_waiting
        try:
            self.admission.request(ticket)
            if not placed.done():
                await asyncio.wait((placed,), timeout=max(0.0, plan.deadline - time.monotonic()))
            if not placed.done():
                raise DeadlineExceeded("the deadline passed before a worker was free", reason="queue")
            return placed.result()
        except BaseException:
            self._give_up(placed, ticket)
            raise

    def _give_up(self, placed: asyncio.Future[Attempt | None], ticket: Ticket[Scan, Room]) -> None:
        self.admission.withdraw(ticket)
        if placed.done() and placed.exception() is None and (attempt := placed.result()) is not None:
            for choice in list(attempt.choices.values()):
                self._abandon(attempt, choice)

    def _abandon(self, attempt: Attempt, choice: Choice) -> None:
        """It was placed, and is not wanted any more."""
        attempt.leave(choice)
        self.admission.ended(choice.plan.tenant)

    def _record(self, choice: Choice, attempt: Attempt) -> None:
        plan, timeline, now = choice.plan, choice.timeline, time.monotonic()
        timeline.dispatched(now)
        if not self._telemetry.is_on:
            return
        attributes: Attributes = {"splitfire.choice": choice.index}
        self._telemetry.record("admit", plan.traceparent, timeline.queued_at, timeline.place_began, attributes)
        placed_on = {**attributes, **self._names(attempt.placement), **self._costs(plan.request_id)}
        self._telemetry.record("place", plan.traceparent, timeline.place_began, timeline.placed_at, placed_on)
        self._telemetry.record("dispatch", plan.traceparent, timeline.placed_at, now, attributes)

    def _dispatch(self, attempt: Attempt) -> None:
        """Submit to both workers at once. Decode holds no memory for it yet."""
        attempt.is_dispatched = True
        choices, placement = list(attempt.choices.values()), attempt.placement
        plan = choices[0].plan
        for choice in choices:
            choice.advance(ReqEvent.DISPATCH)
            self._record(choice, attempt)
        send(attempt, self.fleet)
        if plan.session_id:
            self.placing.remember(plan.session_id, placement)

    def _redirect(self, attempt: Attempt) -> bool:
        """The hand-off failed, the prompt is still held: another decode worker takes it. False: there is none now."""
        choices, placement = list(attempt.choices.values()), attempt.placement
        moved = self.placing.find_again(choices, placement)
        if moved is None or moved.prefill is None or moved.decode is None:
            return False
        prefill, decode = self.fleet.worker(moved.prefill), self.fleet.worker(moved.decode)
        if prefill is None or decode is None or attempt.number not in prefill.attempts:
            return False
        self.fleet.move(attempt.number, placement.decode, moved.decode, attempt.work.num_tokens, attempt)
        attempt.placement = moved
        send_again(attempt, prefill, decode)
        plan = choices[0].plan
        log.info("redirected", request_id=plan.request_id, trace_id=plan.trace_id, to=decode.hello.worker_id)
        return True

    def _costs(self, request_id: str) -> Attributes:
        """Of the candidate that was taken, in ms."""
        placed = next((placed for placed in self.placing.latest if placed.request_id == request_id), None)
        return cost_attributes(placed.decision.explain(1)[0]) if placed is not None else {}

    def _names(self, placement: Placement) -> dict[str, str]:
        parts = (("splitfire.prefill_worker", placement.prefill), ("splitfire.decode_worker", placement.decode))
        workers = {key: self.fleet.worker(incarnation) for key, incarnation in parts if incarnation}
        return {key: worker.hello.worker_id for key, worker in workers.items() if worker is not None}
