"""Admit, dispatch, recover: every choice of a request runs here, attempt by attempt. Event loop only.

One path for whatever interrupts an attempt (a worker died, a hand-off failed, no room): it is submitted again elsewhere
with the ids already streamed. Sampling is a function of (seed, choice, position), so the answer does not change.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from random import Random

import structlog

from router.admission import Admission, Ticket
from router.attempt import Attempt
from router.choice import Choice
from router.fleet import Fleet, WorkerHandle
from router.placement import Demand, Placement, Split, missing_role, place, place_again
from splitfire.core import limits
from splitfire.core.errors import DeadlineExceeded, Exhausted, SplitfireError, Unavailable
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.lifecycle import ReqEvent
from splitfire.core.telemetry import Telemetry
from splitfire.core.wire import grammar_to_wire, sampling_to_wire, stopping_to_wire
from splitfire.v1 import fleet_pb2, inference_pb2

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

    async def run(self, choice: Choice) -> None:
        """Returns when the choice is done; raises what the client is to be told. Cancelling it cancels the work."""
        try:
            await self._run(choice)
        except asyncio.CancelledError:
            choice.advance(ReqEvent.CANCEL)
            raise
        except Exception:
            if choice.is_finished:  # a stop string was found meanwhile: the answer is complete
                choice.advance(ReqEvent.FINISH)
                return
            choice.advance(ReqEvent.FAIL)
            raise

    async def _run(self, choice: Choice) -> None:
        last: SplitfireError | None = None
        for number in range(limits.MAX_ATTEMPTS):
            if number:
                await asyncio.sleep(self._random.uniform(0, BACKOFF_S * 2 ** (number - 1)))
                if choice.is_finished:  # the client's reading caught up with a stop string meanwhile
                    choice.advance(ReqEvent.FINISH)
                    return
                choice.advance(ReqEvent.RESUBMIT)
            error = await self._attempt(choice, is_first=number == 0)
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

    async def _attempt(self, choice: Choice, *, is_first: bool) -> SplitfireError | None:
        """One try, from admission to its end; None: finished. Whatever happens, nothing of it is left at any worker."""
        attempt = await self._admit(choice)
        if attempt is None:
            return None
        try:
            if is_first:
                choice.advance(ReqEvent.ADMIT)
            if choice.is_finished:
                return None
            if not attempt.ended.done():  # a worker may have gone since it was placed
                self._dispatch(choice, attempt)
                choice.advance(ReqEvent.DISPATCH)
                self._record(choice, attempt)
            async with asyncio.timeout(max(0.0, choice.plan.deadline - time.monotonic())):
                return await asyncio.shield(attempt.ended)
        except TimeoutError as exc:
            stage = "decode" if choice.ids else "prefill"
            raise DeadlineExceeded(f"the deadline passed after {len(choice.ids)} tokens", reason=stage) from exc
        finally:
            attempt.end(None, "request over")
            self.admission.ended()

    async def _admit(self, choice: Choice) -> Attempt | None:
        """Waits for a place; the attempt is counted at its workers when this returns. None: it is not wanted any more."""
        plan = choice.plan
        if (reason := missing_role(self.fleet.snapshot(), self.split)) is not None:
            raise Unavailable(f"no {reason.removeprefix('no_')} worker is attached", reason=reason, retry_after_s=1.0)
        placed: asyncio.Future[Attempt | None] = asyncio.get_running_loop().create_future()

        def start(placement: Placement) -> None:
            attempt = Attempt(choice, placement, self.fleet, self._vocab_size, self._redirect)
            choice.end_attempt = lambda reason: attempt.end(None, reason)
            placed.set_result(attempt)

        def expire(error: Exhausted) -> None:
            placed.set_exception(error)

        ticket = Ticket(plan.priority, 4 * (len(plan.prompt) + len(plan.predicted)), lambda: self._find_room(choice), start, expire)
        choice.timeline.queued_at = time.monotonic()

        def stop_waiting(_reason: str) -> None:
            self.admission.withdraw(ticket)
            if not placed.done():
                placed.set_result(None)

        choice.end_attempt = stop_waiting
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
            attempt.end(None)
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

    def _find_room(self, choice: Choice) -> Placement | None:
        choice.timeline.place_began = time.monotonic()
        placement = place(self.fleet.snapshot(), self._demand(choice), self.split, self._random)
        choice.timeline.placed_at = time.monotonic()
        return placement

    def _demand(self, choice: Choice) -> Demand:
        plan = choice.plan
        return Demand(
            num_tokens=len(plan.prompt) + len(choice.ids),
            ends_with_first_token=plan.stopping.max_tokens - len(choice.ids) == 1,
            prefers=self._sessions.get(plan.session_id, frozenset()) if plan.session_id else frozenset(),
            avoids=frozenset(choice.failed_at),
        )

    def _dispatch(self, choice: Choice, attempt: Attempt) -> None:
        """Submit to both workers at once. Decode holds no memory for it yet."""
        choice.timeline.worker_phases.clear()  # of an attempt before
        plan, placement = choice.plan, attempt.placement
        prefill = self.fleet.worker(placement.prefill) if placement.prefill else None
        decode = self.fleet.worker(placement.decode) if placement.decode else None
        submit = self._submit(choice, attempt)
        if prefill is not None and decode is not None:
            to_decode, to_prefill = _handoff_ends(prefill, decode)
            attempt.transfer_id = to_decode.transfer_id
            ends = ((prefill, to_decode, fleet_pb2.PART_PREFILL), (decode, to_prefill, fleet_pb2.PART_DECODE))
            for worker, handoff, part in ends:
                mine = fleet_pb2.Submit()
                mine.CopyFrom(submit)
                mine.part = part
                if part == fleet_pb2.PART_DECODE:
                    mine.predicted_token_ids.extend(plan.predicted)
                mine.handoff.CopyFrom(handoff)
                worker.send(submit=mine)
        elif prefill is not None:
            submit.part = fleet_pb2.PART_PREFILL
            prefill.send(submit=submit)
        elif decode is not None:
            submit.part = fleet_pb2.PART_WHOLE
            submit.predicted_token_ids.extend(plan.predicted)
            decode.send(submit=submit)
        if plan.session_id:
            self._remember(plan.session_id, placement)

    def _redirect(self, attempt: Attempt) -> bool:
        """The hand-off failed, the prompt is still held: another decode worker takes it. False: there is none now."""
        choice, placement = attempt.choice, attempt.placement
        moved = place_again(self.fleet.snapshot(), self._demand(choice), placement, self._random)
        if moved is None or moved.prefill is None or moved.decode is None:
            return False
        prefill, decode = self.fleet.worker(moved.prefill), self.fleet.worker(moved.decode)
        if prefill is None or decode is None or attempt.number not in prefill.attempts:
            return False
        self.fleet.move(attempt.number, placement.decode, moved.decode, attempt)
        attempt.placement = moved
        to_decode, to_prefill = _handoff_ends(prefill, decode)
        attempt.transfer_id = to_decode.transfer_id
        submit = self._submit(choice, attempt)
        submit.part = fleet_pb2.PART_DECODE
        submit.predicted_token_ids.extend(choice.plan.predicted)
        submit.handoff.CopyFrom(to_prefill)
        decode.send(submit=submit)
        prefill.send(redirect=fleet_pb2.Redirect(attempt=attempt.number, handoff=to_decode))
        log.info("redirected", request_id=choice.plan.request_id, to=decode.hello.worker_id)
        return True

    def _submit(self, choice: Choice, attempt: Attempt) -> fleet_pb2.Submit:
        """What the workers are to continue: the ids this attempt began with, whatever it has brought since."""
        plan, ids = choice.plan, choice.ids[: attempt.resumed_at]
        fingerprint = self.fleet.fingerprint
        assert fingerprint is not None  # it was placed, so somebody is attached
        root = chain_root(b"", fingerprint.digest, "")
        return fleet_pb2.Submit(
            attempt=attempt.number,
            request_id=plan.request_id,
            prompt_token_ids=plan.prompt,
            output_token_ids=ids,
            choice=choice.index,
            sampling=sampling_to_wire(plan.sampling),
            stopping=stopping_to_wire(plan.stopping),
            priority=plan.priority,  # type: ignore[arg-type]
            block_hashes=hash_blocks(root, (*plan.prompt, *ids), fingerprint.block_size),
            traceparent=plan.traceparent,
            grammar=grammar_to_wire(plan.grammar) if plan.grammar is not None else None,
        )

    def _remember(self, session_id: str, placement: Placement) -> None:
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = frozenset(filter(None, (placement.prefill, placement.decode)))
        while len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    def _names(self, placement: Placement) -> dict[str, str]:
        parts = (("splitfire.prefill_worker", placement.prefill), ("splitfire.decode_worker", placement.decode))
        workers = {key: self.fleet.worker(incarnation) for key, incarnation in parts if incarnation}
        return {key: worker.hello.worker_id for key, worker in workers.items() if worker is not None}


def _handoff_ends(prefill: WorkerHandle, decode: WorkerHandle) -> tuple[fleet_pb2.Handoff, fleet_pb2.Handoff]:
    """One transfer as each end is told of it: to prefill, who receives; to decode, who sends."""
    transfer_id, token = secrets.token_bytes(16), secrets.token_bytes(16)
    to_decode = fleet_pb2.Handoff(transfer_id=transfer_id, token=token, peer=decode.peer())
    return to_decode, fleet_pb2.Handoff(transfer_id=transfer_id, token=token, peer=prefill.peer())
