"""Policy of the prefill role: one record per job, from submit to the end of its hold. io thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvtransfer.protocol import WITHDRAWN
from kvtransfer.sender import Outcome
from prefill_svc.gate import Claim, HoldGate
from prefill_svc.ship import BlockShipment, Computed, first_token
from splitfire.core import limits
from splitfire.core.errors import InvalidInput, Mismatch, SplitfireError, Unavailable
from splitfire.engine.sequence import SeqId
from splitfire.engine.updates import SequenceUpdate
from splitfire.v1 import fleet_pb2, inference_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Handoff, Job, JobTable, Replies, failure, logprobs_to_wire, refusal


@dataclass(slots=True)
class _Prefill:
    """A prompt, of one choice or several. `shipment` is None before the first chunk and while a lost hand-off waits for the router to
    name another receiver."""

    job: Job
    handoff: Handoff | None
    choices: dict[SeqId, Job]  # those still wanted
    has_begun: bool = False  # its first chunk
    computed: Computed = field(default_factory=Computed)
    shipment: BlockShipment | None = None
    hold: asyncio.TimerHandle | None = None  # how long it waits for that


class PrefillService:
    """Computes prompts and hands them over. Holds a job's blocks from its first chunk until a receiver has them."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._prefills: JobTable[_Prefill] = JobTable()
        self._gate = HoldGate(context.host.engine.blocks.num_blocks)

    @property
    def num_jobs(self) -> int:
        return len(self._prefills)

    def owns(self, seq_id: SeqId) -> bool:
        return seq_id in self._prefills

    def submit(self, job: Job) -> None:
        if job.handoff is None and job.spec.stopping.max_tokens - len(job.spec.output) > 1:
            raise InvalidInput("handoff", "a prompt with more than one token to follow needs one")
        prefill = _Prefill(job, job.handoff, {member.spec.seq_id: member for member in job.members()})
        self._prefills.add(prefill)
        if job.handoff is None:
            self._context.host.add(job.spec)
        else:
            self._gate.enter(self._claim(prefill, job.handoff))
            self._let_pass()

    def redirect(self, replies: Replies, attempt: int, handoff: Handoff) -> None:
        """Another receiver for a prompt whose hand-off failed: what is computed goes there, the rest as it comes."""
        held = [p for p in self._prefills.of(replies, attempt) if p.handoff is not None]
        if not held:
            error = Unavailable("the prompt is not held any more; submit again", reason="not_held")
            replies.refused(refusal(attempt, error, is_retryable=True))
        for prefill in held:
            shipment, prefill.shipment, prefill.handoff = prefill.shipment, None, handoff
            if shipment is not None:  # decode's word for it came to the router before ours
                shipment.withdraw("redirected")
            if prefill.hold is not None:
                prefill.hold.cancel()
                prefill.hold = None
            self._gate.hold(self._claim(prefill, handoff))
            if prefill.has_begun:
                self._offer_again(prefill, handoff)

    def on_started(self, seq_id: SeqId) -> None:
        prefill = self._prefills.get(seq_id)
        if prefill is not None and not prefill.has_begun:
            prefill.has_begun = True
            if prefill.handoff is not None:
                self._offer(prefill, prefill.handoff)

    def on_update(self, update: SequenceUpdate) -> None:
        prefill = self._prefills.get(update.seq_id)
        if prefill is None:
            return
        job = prefill.job
        if update.error:
            self._end(prefill)
            job.refuse(failure(update.error))
            return
        firsts = [first for first in update.forks or (update,) if first.seq_id in prefill.choices]
        going_on = [first for first in firsts if first.tokens and not first.is_finished]
        if not update.is_finished:
            told = [first_token(prefill.choices[first.seq_id].choice, first) for first in going_on]
            prefill.computed = Computed(update.num_computed, update.block_ids, told)
            if prefill.shipment is not None:
                prefill.shipment.advance(prefill.computed)  # before the token: decode's answer is waited for
        for first in firsts:
            self._send_first(prefill, first)
        if firsts and prefill.shipment is not None:
            prefill.shipment.first_token_told()
        if update.is_finished or not prefill.choices:
            self._end(prefill)

    def fail(self, seq_id: SeqId, error: SplitfireError) -> None:
        prefill = self._prefills.get(seq_id)
        if prefill is not None:
            self._end(prefill)
            prefill.job.refuse(error)

    def give_back(self, replies: Replies, error: SplitfireError, *, only_waiting: bool) -> None:
        for prefill in self._prefills.of(replies, None):
            if not (only_waiting and prefill.has_begun):
                self._end(prefill)
                prefill.job.refuse(error)

    def cancel(self, replies: Replies, attempt: int | None, choice: int | None = None) -> None:
        for prefill in self._prefills.of(replies, attempt):
            prefill.choices = {i: job for i, job in prefill.choices.items() if choice not in (None, job.choice)}
            if not prefill.choices:
                self._end(prefill)

    # -- ShipmentOwner

    def on_granted(self, shipment: BlockShipment) -> None:
        self._gate.leave(shipment.job.spec.seq_id)
        self._let_pass()

    def on_closed(self, shipment: BlockShipment, outcome: Outcome, reason: str) -> None:
        job, context = shipment.job, self._context
        now = context.clock()
        context.tally.sent(outcome, shipment.sender.bytes_sent)
        context.telemetry.record(
            "ship",
            job.traceparent,
            shipment.began,
            now,
            {
                "splitfire.outcome": outcome.value,
                "splitfire.kv_bytes": shipment.sender.bytes_sent,
            },
        )
        prefill = self._prefills.get(job.spec.seq_id)
        if prefill is None or prefill.shipment is not shipment:
            return
        if outcome is Outcome.RECEIVED:
            self._end(prefill)
            timing = fleet_pb2.WorkerTiming(phases=context.teller.shipped(shipment.grant_s, shipment.pack_s))
            transfer_id = shipment.sender.shipment.transfer_id
            job.replies.finished(fleet_pb2.Finished(attempt=job.attempt, timing=timing, transfer_id=transfer_id))
        elif outcome is Outcome.REFUSED:
            self._end(prefill)
            job.refuse(Mismatch(f"the hand-off is not possible: {reason}", reason="handoff_refused"))
        else:
            self._strand(prefill, outcome, reason)

    # -- inside

    def _claim(self, prefill: _Prefill, handoff: Handoff) -> Claim:
        spec = prefill.job.spec
        num_blocks = self._context.layout.blocks_for(spec.num_tokens)
        return Claim(spec.seq_id, handoff.peer.incarnation, num_blocks, 2 * spec.priority + bool(spec.output))

    def _let_pass(self) -> None:
        for seq_id in self._gate.passing():
            prefill = self._prefills.get(seq_id)  # type: ignore[arg-type]
            if prefill is not None:
                self._context.host.add(prefill.job.spec)

    def _offer(self, prefill: _Prefill, handoff: Handoff) -> None:
        prefill.shipment = shipment = BlockShipment(self._context, prefill.job, handoff, self)
        if prefill.computed.num_tokens:
            shipment.advance(prefill.computed)

    def _offer_again(self, prefill: _Prefill, handoff: Handoff) -> None:
        try:
            self._offer(prefill, handoff)
        except SplitfireError as exc:
            self._strand(prefill, Outcome.ABORTED, str(exc))

    def _strand(self, prefill: _Prefill, outcome: Outcome, reason: str) -> None:
        """The hand-off is lost, the prompt is not: the router may name another receiver, for as long as a hold lasts."""
        prefill.shipment = None
        assert prefill.handoff is not None
        self._gate.hold(self._claim(prefill, prefill.handoff))
        prefill.hold = asyncio.get_running_loop().call_later(limits.REDIRECT_WAIT_S, self._let_go, prefill)
        error = Unavailable(f"the hand-off did not happen: {reason}", reason=f"handoff_{outcome.name.lower()}")
        refused = refusal(prefill.job.attempt, error, is_retryable=True)
        refused.is_held = True
        refused.transfer_id = prefill.handoff.transfer_id
        prefill.job.replies.refused(refused)

    def _let_go(self, prefill: _Prefill) -> None:
        self._end(prefill)
        prefill.job.refuse(Unavailable("nobody took the prompt in time", reason="handoff_hold_expired"))

    def _send_first(self, prefill: _Prefill, first: SequenceUpdate) -> None:
        """To the router: a choice's first token, and its end if it has none or that ends it."""
        job = prefill.choices[first.seq_id]
        if first.tokens:
            self._send_first_token(job, first)
        if first.error:
            job.refuse(failure(first.error))
        elif first.is_finished:
            reason = inference_pb2.FINISH_REASON_STOP if first.stopped else inference_pb2.FINISH_REASON_LENGTH
            job.replies.finished(fleet_pb2.Finished(attempt=job.attempt, choice=job.choice, reason=reason))
        if first.is_finished:
            del prefill.choices[first.seq_id]

    def _send_first_token(self, job: Job, update: SequenceUpdate) -> None:
        [token], times, context = update.tokens, update.times, self._context
        assert times is not None
        sampled_at, told_at = times.prompt_done or 0.0, context.clock()
        logprobs = logprobs_to_wire(token)
        output = fleet_pb2.SequenceOutput(
            attempt=job.attempt,
            choice=job.choice,
            offset=update.offset,
            token_ids=[token.token_id],
            logprobs=[logprobs] if logprobs is not None else [],
            timing=context.teller.prompt(job.received_at, times, told_at, update.num_cached),
        )
        job.replies.output(output)
        attributes: dict[str, str | int | float | bool] = {"splitfire.attempt": job.attempt}
        computed = job.spec.num_tokens - update.num_cached
        context.telemetry.record(
            "prefill",
            job.traceparent,
            times.started or job.received_at,
            sampled_at,
            {**attributes, "gen_ai.usage.input_tokens": computed, "gen_ai.usage.cache_read.input_tokens": update.num_cached},
        )
        context.telemetry.record("first_token", job.traceparent, sampled_at, told_at, attributes)

    def _end(self, prefill: _Prefill) -> None:
        """Blocks are free with the engine's next turn; a transfer under way is withdrawn."""
        self._prefills.remove(prefill)
        if prefill.hold is not None:
            prefill.hold.cancel()
        if prefill.shipment is not None:
            prefill.shipment.withdraw(WITHDRAWN)
        self._context.host.finish(prefill.job.spec.seq_id)
        self._gate.leave(prefill.job.spec.seq_id)
        self._let_pass()
