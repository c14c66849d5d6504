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
from random import Random

import structlog

from router.admission import Admission, Ticket
from router.attempt import Attempt
from router.choice import Choice
from router.dispatch import send, send_again
from router.first_attempt import FirstAttempt
from router.fleet import Fleet
from router.placement import Demand, Placement, Split, missing_role, place, place_again
from splitfire.core import limits
from splitfire.core.errors import DeadlineExceeded, Exhausted, SplitfireError, Unavailable
from splitfire.core.lifecycle import Req, ReqEvent
from splitfire.core.telemetry import Telemetry
from splitfire.v1 import inference_pb2

log = structlog.get_logger("router")
BACKOFF_S = 0.05
MAX_SESSIONS = 10_000


class Flow:
    """Runs choices to their end. Event loop only."""

    def __init__(self, fleet: Fleet, admission: Admission[Placement], telemetry: Telemetry, split: Split, vocab_size: int) -> None:
        self.fleet = fleet
        self.admission = admission
        self.split: Split = split
        self._telemetry = telemetry
        self._vocab_size = vocab_size
        self._random = Random(secrets.randbits(64))
        self._sessions: dict[str, frozenset[bytes]] = {}

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

    async def _run(self, choice: Choice, first: FirstAttempt | None) -> None:
        last: SplitfireError | None = None
        for number in range(limits.MAX_ATTEMPTS):
            if number:
                await asyncio.sleep(self._random.uniform(0, BACKOFF_S * 2 ** (number - 1)))
                if choice.is_finished:  # the client's reading caught up with a stop string meanwhile
                    choice.advance(ReqEvent.FINISH)
                    return
                choice.advance(ReqEvent.RESUBMIT)
            admitting = self._admit([choice]) if first is None or number else first.get(choice)
            error = await self._attempt(choice, admitting)
            if error is None or choice.is_finished:
                choice.advance(ReqEvent.FINISH)
                return
            log.warning(
                "attempt failed",
                request_id=choice.plan.request_id,
                attempt=number + 1,
                reason=error.reason,
                streamed=len(choice.ids),
            )
            if not error.is_retryable or (last is not None and last.reason == error.reason == "kv_digest_mismatch"):
                raise error
            if choice.has_ended:  # its worker died between the last token and saying so
                is_length = choice.ids[-1] not in choice.plan.stopping.stop_token_ids
                choice.finish(inference_pb2.FINISH_REASON_LENGTH if is_length else inference_pb2.FINISH_REASON_STOP)
                choice.advance(ReqEvent.FINISH)
                return
            last = error
        assert last is not None
        raise last

    async def _attempt(self, choice: Choice, admitting: Awaitable[Attempt | None]) -> SplitfireError | None:
        """One try, from admission to its end; None: finished. Whatever happens, nothing of it is left at any worker."""
        attempt = await admitting
        if attempt is None:
            return None
        try:
            if choice.is_finished:
                return None
            if not attempt.is_dispatched and attempt.choices:  # a worker may have gone since it was placed
                self._dispatch(attempt)
            async with asyncio.timeout(max(0.0, choice.plan.deadline - time.monotonic())):
                return await asyncio.shield(attempt.ended(choice))
        except TimeoutError as exc:
            stage = "decode" if choice.ids else "prefill"
            raise DeadlineExceeded(f"the deadline passed after {len(choice.ids)} tokens", reason=stage) from exc
        finally:
            attempt.leave(choice, None, "request over")
            self.admission.ended()

    async def _admit(self, choices: list[Choice]) -> Attempt | None:
        """Waits for a place; the attempt is counted at its workers when this returns. None: it is not wanted any more. Of several
        choices some may go meanwhile, never the last."""
        plan = choices[0].plan
        if (reason := missing_role(self.fleet.snapshot(), self.split)) is not None:
            raise Unavailable(f"no {reason.removeprefix('no_')} worker is attached", reason=reason, retry_after_s=1.0)
        placed: asyncio.Future[Attempt | None] = asyncio.get_running_loop().create_future()

        def start(placement: Placement) -> int:
            attempt = Attempt(choices, placement, self.fleet, self._vocab_size, self._redirect)
            for choice in choices:
                choice.end_attempt = partial(attempt.leave, choice, None)
                if choice.state is Req.ACCEPTED:
                    choice.advance(ReqEvent.ADMIT)
            placed.set_result(attempt)
            return len(choices)

        def expire(error: Exhausted) -> None:
            placed.set_exception(error)

        ticket = Ticket(
            plan.priority, 4 * (len(plan.prompt) + len(plan.predicted)), lambda: self._find_room(choices), start, expire
        )
        for choice in choices:
            choice.timeline.queued_at = time.monotonic()

        def stop_waiting(_reason: str) -> None:
            self.admission.withdraw(ticket)
            if not placed.done():
                placed.set_result(None)

        if len(choices) == 1:  # several have no text yet that could end them
            choices[0].end_attempt = stop_waiting
        try:
            self.admission.request(ticket)
            async with asyncio.timeout(max(0.0, plan.deadline - time.monotonic())):
                return await asyncio.shield(placed)
        except TimeoutError as exc:
            self._give_up(placed, ticket)
            raise DeadlineExceeded("the deadline passed before a worker was free", reason="queue") from exc
        except asyncio.CancelledError:
            self._give_up(placed, ticket)
            raise

    def _give_up(self, placed: asyncio.Future[Attempt | None], ticket: Ticket[Placement]) -> None:
        self.admission.withdraw(ticket)
        if placed.done() and placed.exception() is None and (attempt := placed.result()) is not None:
            for choice in list(attempt.choices.values()):
                self._abandon(attempt, choice)

    def _abandon(self, attempt: Attempt, choice: Choice) -> None:
        """It was placed, and is not wanted any more."""
        attempt.leave(choice)
        self.admission.ended()

    def _record(self, choice: Choice, attempt: Attempt) -> None:
        plan, timeline, now = choice.plan, choice.timeline, time.monotonic()
        timeline.dispatched_at = now
        attributes: dict[str, str | int | float | bool] = {
            "splitfire.request_id": plan.request_id,
            "splitfire.choice": choice.index,
        }
        self._telemetry.record("admit", plan.traceparent, timeline.queued_at, timeline.place_began, attributes)
        placed_on = {**attributes, **self._names(attempt.placement)}
        self._telemetry.record("place", plan.traceparent, timeline.place_began, timeline.placed_at, placed_on)
        self._telemetry.record("dispatch", plan.traceparent, timeline.placed_at, now, attributes)

    def _find_room(self, choices: Sequence[Choice]) -> Placement | None:
        began = time.monotonic()
        placement = place(self.fleet.snapshot(), self._demand(choices), self.split, self._random)
        for choice in choices:
            choice.timeline.place_began, choice.timeline.placed_at = began, time.monotonic()
        return placement

    def _demand(self, choices: Sequence[Choice]) -> Demand:
        choice = choices[0]
        plan = choice.plan
        return Demand(
            num_tokens=len(plan.prompt) + len(choice.ids),
            ends_with_first_token=plan.stopping.max_tokens - len(choice.ids) == 1,
            num_choices=len(choices),
            prefers=self._sessions.get(plan.session_id, frozenset()) if plan.session_id else frozenset(),
            avoids=frozenset(choice.failed_at),
        )

    def _dispatch(self, attempt: Attempt) -> None:
        """Submit to both workers at once. Decode holds no memory for it yet."""
        attempt.is_dispatched = True
        choices, placement = list(attempt.choices.values()), attempt.placement
        plan = choices[0].plan
        for choice in choices:
            choice.timeline.worker_phases.clear()  # of an attempt before
            choice.advance(ReqEvent.DISPATCH)
            self._record(choice, attempt)
        send(attempt, self.fleet)
        if plan.session_id:
            self._remember(plan.session_id, placement)

    def _redirect(self, attempt: Attempt) -> bool:
        """The hand-off failed, the prompt is still held: another decode worker takes it. False: there is none now."""
        choices, placement = list(attempt.choices.values()), attempt.placement
        moved = place_again(self.fleet.snapshot(), self._demand(choices), placement, self._random)
        if moved is None or moved.prefill is None or moved.decode is None:
            return False
        prefill, decode = self.fleet.worker(moved.prefill), self.fleet.worker(moved.decode)
        if prefill is None or decode is None or attempt.number not in prefill.attempts:
            return False
        self.fleet.move(attempt.number, placement.decode, moved.decode, attempt)
        attempt.placement = moved
        send_again(attempt, self.fleet, prefill, decode)
        log.info("redirected", request_id=choices[0].plan.request_id, to=decode.hello.worker_id)
        return True

    def _remember(self, session_id: str, placement: Placement) -> None:
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = frozenset(filter(None, (placement.prefill, placement.decode)))
        while len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    def _names(self, placement: Placement) -> dict[str, str]:
        parts = (("splitfire.prefill_worker", placement.prefill), ("splitfire.decode_worker", placement.decode))
        workers = {key: self.fleet.worker(incarnation) for key, incarnation in parts if incarnation}
        return {key: worker.hello.worker_id for key, worker in workers.items() if worker is not None}
