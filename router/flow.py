"""Dispatch, order, recover: one `Choice` per answer, one `Attempt` per try, one path for everything that interrupts it.

A choice's token ids are ordered by offset whoever sends them; an equal duplicate is dropped (decode repeats the first
token), a different one or a gap fails the attempt. A failed attempt is submitted again elsewhere with the ids that were
streamed; sampling is a function of (seed, choice, position), so the answer does not change.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import structlog

from router.admission import Admission, Ticket
from router.fleet import Fleet
from router.placement import Demand, Placement, Split, missing_role, place
from splitfire.core import limits
from splitfire.core.errors import Code, DataLoss, DeadlineExceeded, Exhausted, Internal, SplitfireError, Unavailable
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.lifecycle import REQUEST, Req, ReqEvent, advance
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.telemetry import Telemetry
from splitfire.core.wire import sampling_to_wire, stopping_to_wire
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
BACKOFF_S = 0.05


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What every choice of a request shares."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stopping: StopParams
    priority: int
    session_id: str
    traceparent: str
    accepted_at: float
    deadline: float  # both on this process's monotonic clock


@dataclass(slots=True)
class Timeline:
    """Instants of one choice on this process's clock, and what workers measured, laid out from dispatch."""

    place_began: float = 0.0
    placed_at: float = 0.0
    dispatched_at: float = 0.0
    first_token_at: float | None = None
    worker_phases: list[inference_pb2.Phase] = field(default_factory=list)
    cached_tokens: int = 0
    kv_transfer: inference_pb2.KvTransfer | None = None


class Choice:
    """One answer. The flow fills it, the client's stream empties it; `changed` is set whenever there is something new."""

    def __init__(self, plan: RequestPlan, index: int, changed: asyncio.Event) -> None:
        self.plan = plan
        self.index = index
        self.state = Req.ACCEPTED
        self.ids: list[int] = []  # at most max_tokens, so bounded
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.finish_reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
        self.timeline = Timeline()
        self.attempt: Attempt | None = None
        self._changed = changed

    @property
    def has_ended(self) -> bool:
        """The last id is one that ends the answer, so there is nothing left to compute."""
        stopping = self.plan.stopping
        is_stop = bool(self.ids) and self.ids[-1] in stopping.stop_token_ids and len(self.ids) > stopping.min_tokens
        return is_stop or len(self.ids) >= stopping.max_tokens

    def stop(self) -> None:
        """A stop string matched: what the workers still make of it is not wanted."""
        self.finish_reason = inference_pb2.FINISH_REASON_STOP
        if self.attempt is not None:
            self.attempt.end(None, "stop string")

    def advance(self, event: ReqEvent) -> None:
        self.state = advance(REQUEST, self.state, event)

    def append(self, output: fleet_pb2.SequenceOutput, vocab_size: int) -> str:
        """Takes what is new; the reason when the worker broke the protocol, else empty."""
        offset, ids = output.offset, output.token_ids
        known = len(self.ids) - offset
        if known < 0:
            return f"a gap: offset {offset} after {len(self.ids)} tokens"
        overlap = min(known, len(ids))
        if list(ids[:overlap]) != self.ids[offset : offset + overlap]:
            return f"another token than before at offset {offset}"
        fresh = list(ids[overlap:])
        if any(token >= vocab_size for token in fresh) or len(self.ids) + len(fresh) > self.plan.stopping.max_tokens:
            return "a token id outside the vocabulary, or more tokens than asked for"
        if self.plan.sampling.logprobs is not None:
            if len(output.logprobs) != len(ids):
                return "tokens without their log-probabilities"
            self.logprobs.extend(output.logprobs[overlap:])
        self.ids.extend(fresh)
        if fresh:
            self._changed.set()
        return ""

    def finish(self, reason: inference_pb2.FinishReason.ValueType) -> None:
        self.finish_reason = reason
        self._changed.set()


class Attempt:
    """One try of one choice at the workers it was placed on. Ends once, with None (finished) or the error."""

    def __init__(self, choice: Choice, placement: Placement, fleet: Fleet, vocab_size: int) -> None:
        self.choice = choice
        self.placement = placement
        self.ended: asyncio.Future[SplitfireError | None] = asyncio.get_running_loop().create_future()
        self._fleet = fleet
        self._vocab_size = vocab_size
        self._is_prefill_over = placement.prefill is None
        self._has_decoded = False
        self._resumed_at = len(choice.ids)
        self.number = fleet.begin(placement, len(choice.plan.prompt) + len(choice.ids), self)

    def end(self, error: SplitfireError | None, cancel_reason: str | None = "attempt over") -> None:
        """Over at every worker that still has it."""
        if self.ended.done():
            return
        self.ended.set_result(error)
        self._fleet.end(self.number, None, cancel_reason)

    # -- AttemptEvents

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None:
        choice = self.choice
        had = len(choice.ids)
        broken = choice.append(output, self._vocab_size)
        if broken:
            log.error("worker broke the protocol", request_id=choice.plan.request_id, detail=broken)
            self.end(Unavailable("a worker broke the protocol", reason="worker_protocol_error"))
            return
        if output.HasField("timing"):
            choice.timeline.worker_phases.extend(output.timing.phases)
            choice.timeline.cached_tokens = max(choice.timeline.cached_tokens, output.timing.cached_tokens)
        if had == self._resumed_at and len(choice.ids) > had:
            self._fleet.started(self.number)
            if choice.timeline.first_token_at is None:
                choice.timeline.first_token_at = time.monotonic()
            choice.advance(ReqEvent.TOKEN)
        self._has_decoded |= incarnation == self.placement.decode

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None:
        timeline = self.choice.timeline
        timeline.worker_phases.extend(finished.timing.phases)
        if finished.HasField("kv_transfer"):
            timeline.kv_transfer = finished.kv_transfer
        if finished.reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
            self._fleet.end(self.number, incarnation, None)
            self.choice.finish(finished.reason)
            self.end(None)
        elif incarnation == self.placement.prefill:  # shipped: decode has it all
            self._is_prefill_over = True
            self._fleet.end(self.number, incarnation, None)

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None:
        self._fleet.end(self.number, incarnation, None)
        error = SplitfireError(refused.message, reason=refused.reason)
        if refused.reason == "kv_digest_mismatch":
            error = DataLoss(refused.message, reason=refused.reason)
        elif refused.code == Code.INTERNAL:
            error = Internal(refused.message, reason=refused.reason)
        elif refused.is_retryable:
            error = Unavailable(refused.message, reason=refused.reason)
        error.is_retryable = refused.is_retryable
        self.end(error)

    def on_lost(self, incarnation: bytes) -> None:
        if incarnation == self.placement.prefill and (self._is_prefill_over or self._has_decoded):
            return
        self.end(Unavailable("a worker was lost", reason="no_decode" if incarnation == self.placement.decode else "no_prefill"))


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
            choice.advance(ReqEvent.FAIL)
            raise

    async def _run(self, choice: Choice) -> None:
        last: SplitfireError | None = None
        for number in range(limits.MAX_ATTEMPTS):
            if number:
                await asyncio.sleep(self._random.uniform(0, BACKOFF_S * 2 ** (number - 1)))
                choice.advance(ReqEvent.RESUBMIT)
            attempt = await self._start(choice, is_first=number == 0)
            error = await self._finish(choice, attempt, is_first=number == 0)
            if error is None:
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

    async def _start(self, choice: Choice, *, is_first: bool) -> Attempt:
        """Admits and places; the attempt is counted at its workers when this returns, and submitted."""
        plan = choice.plan
        if (reason := missing_role(self.fleet.snapshot(), self.split)) is not None:
            raise Unavailable(f"no {reason.removeprefix('no_')} worker is attached", reason=reason, retry_after_s=1.0)
        placed: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()

        def start(placement: Placement) -> None:
            choice.attempt = Attempt(choice, placement, self.fleet, self._vocab_size)
            placed.set_result(choice.attempt)

        def expire(error: Exhausted) -> None:
            placed.set_exception(error)

        ticket = Ticket(plan.priority, 4 * len(plan.prompt), lambda: self._find_room(choice), start, expire)
        queued_at = time.monotonic()
        try:
            self.admission.request(ticket)
            async with asyncio.timeout(max(0.0, plan.deadline - time.monotonic())):
                attempt = await asyncio.shield(placed)
        except TimeoutError as exc:
            self._give_up(placed, ticket)
            raise DeadlineExceeded("the deadline passed before a worker was free", reason="queue") from exc
        except asyncio.CancelledError:
            self._give_up(placed, ticket)
            raise
        if is_first:
            choice.advance(ReqEvent.ADMIT)
        self._dispatch(choice, attempt)
        choice.advance(ReqEvent.DISPATCH)
        timeline, now = choice.timeline, time.monotonic()
        attributes: dict[str, str | int | float | bool] = {
            "splitfire.request_id": plan.request_id,
            "splitfire.choice": choice.index,
        }
        self._telemetry.record("admit", plan.traceparent, queued_at, timeline.place_began, attributes)
        placed_on = {**attributes, **self._names(attempt.placement)}
        self._telemetry.record("place", plan.traceparent, timeline.place_began, timeline.placed_at, placed_on)
        self._telemetry.record("dispatch", plan.traceparent, timeline.placed_at, now, attributes)
        timeline.dispatched_at = now
        return attempt

    def _give_up(self, placed: asyncio.Future[Attempt], ticket: Ticket[Placement]) -> None:
        self.admission.withdraw(ticket)
        if placed.done() and placed.exception() is None:
            placed.result().end(None)
            self.admission.ended()

    async def _finish(self, choice: Choice, attempt: Attempt, *, is_first: bool) -> SplitfireError | None:
        """Waits for the attempt's end; whatever happens, nothing of it is left at any worker."""
        try:
            async with asyncio.timeout(max(0.0, choice.plan.deadline - time.monotonic())):
                return await asyncio.shield(attempt.ended)
        except TimeoutError as exc:
            stage = "decode" if choice.ids else "prefill"
            raise DeadlineExceeded(f"the deadline passed after {len(choice.ids)} tokens", reason=stage) from exc
        finally:
            attempt.end(None, "request over")
            self.admission.ended()

    def _find_room(self, choice: Choice) -> Placement | None:
        plan = choice.plan
        choice.timeline.place_began = time.monotonic()
        demand = Demand(
            num_tokens=len(plan.prompt) + len(choice.ids),
            ends_with_first_token=plan.stopping.max_tokens - len(choice.ids) == 1,
            prefers=self._sessions.get(plan.session_id, frozenset()) if plan.session_id else frozenset(),
        )
        placement = place(self.fleet.snapshot(), demand, self.split, self._random)
        choice.timeline.placed_at = time.monotonic()
        return placement

    def _dispatch(self, choice: Choice, attempt: Attempt) -> None:
        """Submit to both workers at once. Decode holds no memory for it yet."""
        plan, placement = choice.plan, attempt.placement
        prefill = self.fleet.worker(placement.prefill) if placement.prefill else None
        decode = self.fleet.worker(placement.decode) if placement.decode else None
        submit = self._submit(choice, attempt)
        if prefill is not None and decode is not None:
            transfer_id, token = secrets.token_bytes(16), secrets.token_bytes(16)
            for worker, peer, part in ((prefill, decode, fleet_pb2.PART_PREFILL), (decode, prefill, fleet_pb2.PART_DECODE)):
                mine = fleet_pb2.Submit()
                mine.CopyFrom(submit)
                mine.part = part
                mine.handoff.CopyFrom(fleet_pb2.Handoff(transfer_id=transfer_id, token=token, peer=peer.peer()))
                worker.send(submit=mine)
        elif prefill is not None:
            submit.part = fleet_pb2.PART_PREFILL
            prefill.send(submit=submit)
        elif decode is not None:
            submit.part = fleet_pb2.PART_WHOLE
            decode.send(submit=submit)
        if plan.session_id:
            self._remember(plan.session_id, placement)

    def _submit(self, choice: Choice, attempt: Attempt) -> fleet_pb2.Submit:
        plan = choice.plan
        fingerprint = self.fleet.fingerprint
        assert fingerprint is not None  # it was placed, so somebody is attached
        root = chain_root(b"", fingerprint.digest, "")
        return fleet_pb2.Submit(
            attempt=attempt.number,
            request_id=plan.request_id,
            prompt_token_ids=plan.prompt,
            output_token_ids=choice.ids,
            choice=choice.index,
            sampling=sampling_to_wire(plan.sampling),
            stopping=stopping_to_wire(plan.stopping),
            priority=plan.priority,  # type: ignore[arg-type]
            block_hashes=hash_blocks(root, (*plan.prompt, *choice.ids), fingerprint.block_size),
            traceparent=plan.traceparent,
        )

    def _remember(self, session_id: str, placement: Placement) -> None:
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = frozenset(filter(None, (placement.prefill, placement.decode)))
        while len(self._sessions) > 10_000:
            del self._sessions[next(iter(self._sessions))]

    def _names(self, placement: Placement) -> dict[str, str]:
        parts = (("splitfire.prefill_worker", placement.prefill), ("splitfire.decode_worker", placement.decode))
        workers = {key: self.fleet.worker(incarnation) for key, incarnation in parts if incarnation}
        return {key: worker.hello.worker_id for key, worker in workers.items() if worker is not None}


def phases_of(choice: Choice, queued_at: float, streamed_at: float) -> Sequence[inference_pb2.Phase]:
    """The waterfall of one choice: the router's own instants, and worker durations laid out from dispatch."""
    timeline, accepted_at = choice.timeline, choice.plan.accepted_at
    phases = [
        _phase("accept", accepted_at, accepted_at, queued_at),
        _phase("admit", accepted_at, queued_at, timeline.place_began),
        _phase("place", accepted_at, timeline.place_began, timeline.placed_at),
        _phase("dispatch", accepted_at, timeline.placed_at, timeline.dispatched_at),
    ]
    base = timeline.dispatched_at - accepted_at
    for phase in timeline.worker_phases:
        shifted = inference_pb2.Phase()
        shifted.CopyFrom(phase)
        shifted.start_s += base
        phases.append(shifted)
    if timeline.first_token_at is not None:
        prefilled = max((p.start_s + p.duration_s for p in phases if p.name == "prefill"), default=base)
        first = timeline.first_token_at - accepted_at
        phases.append(
            inference_pb2.Phase(
                name="first_token", start_s=min(prefilled, first), duration_s=max(0.0, first - prefilled), worker="router"
            )
        )
        phases.append(_phase("stream", accepted_at, timeline.first_token_at, streamed_at))
    return sorted(phases, key=lambda p: p.start_s)


def _phase(name: str, accepted_at: float, began: float, ended: float) -> inference_pb2.Phase:
    return inference_pb2.Phase(name=name, start_s=began - accepted_at, duration_s=max(0.0, ended - began), worker="router")
