"""Policy of the decode role: one record per job, from submit to the last token. io thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from decode_svc.intake import Intake
from kvtransfer.protocol import NO_ROOM, WITHDRAWN
from splitfire.core.errors import DataLoss, Mismatch, SplitfireError, Unavailable
from splitfire.engine.sequence import SeqId
from splitfire.engine.spent import NOTHING_SPENT, Spent
from splitfire.engine.updates import SequenceUpdate, plain_update
from splitfire.v1 import fleet_pb2, inference_pb2, kv_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Job, JobTable, Replies, failure, logprobs_to_wire


@dataclass(slots=True)
class _Decode:
    """One choice. One that waits for its KV has an `intake`, which choices of one prompt share; one that generates has `began`."""

    job: Job
    has_started: bool = False  # its prompt, where that is computed here
    intake: Intake | None = None
    first: kv_pb2.FirstToken | None = None  # handed over; repeated in the first frame
    joined_at: float | None = None
    told_at: float | None = None  # the first token, where its prompt is computed here
    began: float | None = None  # first token after that, or after the hand-off
    spent: Spent = NOTHING_SPENT  # of the engine, then
    busy_s: float = 0.0  # of that first step, by rows
    num_drafted: int = 0  # since then
    kv_transfer: inference_pb2.KvTransfer | None = None


class DecodeService:
    """Generates. Holds no memory for a job before its offer."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._decodes: JobTable[_Decode] = JobTable()

    @property
    def num_jobs(self) -> int:
        return len(self._decodes)

    def owns(self, seq_id: SeqId) -> bool:
        return seq_id in self._decodes

    def submit(self, job: Job) -> None:
        if job.part == fleet_pb2.PART_DECODE and job.handoff is None:
            raise SplitfireError("a decode part needs a handoff", reason="invalid_handoff")
        decodes = [_Decode(member) for member in job.members()]
        for decode in decodes:
            self._decodes.add(decode)
        if job.handoff is None:
            self._context.host.add(job.spec)
            return
        try:
            intake = Intake(self._context, job, job.handoff, self._on_joined, self._on_failed)
        except Exception:
            for decode in decodes:
                self._decodes.remove(decode)
            raise
        for decode in decodes:  # an offer that had come before may have ended it already
            decode.intake = intake

    def on_started(self, seq_id: SeqId) -> None:
        decode = self._decodes.get(seq_id)
        if decode is not None:
            decode.has_started = True

    def on_update(self, update: SequenceUpdate) -> None:
        decode = self._decodes.get(update.seq_id)
        if decode is None:
            return
        job = decode.job
        if update.error:
            self._drop(decode)
            job.refuse(failure(update.error))
            return
        if not update.tokens:
            return
        job.replies.output(self._output(decode, update))
        if update.is_finished:
            self._finish(decode, update)

    def on_token(self, seq_id: SeqId, offset: int, token_id: int) -> None:
        """The short way of `on_update`, for what happens most."""
        decode = self._decodes.get(seq_id)
        if decode is None:
            return
        if decode.began is None:
            self.on_update(plain_update(seq_id, offset, token_id))
        else:
            job = decode.job
            output = fleet_pb2.SequenceOutput(attempt=job.attempt, choice=job.choice, offset=offset, token_ids=(token_id,))
            job.replies.output(output)

    def fail(self, seq_id: SeqId, error: SplitfireError) -> None:
        decode = self._decodes.get(seq_id)
        if decode is not None:
            self._drop(decode)
            decode.job.refuse(error)

    def give_back(self, replies: Replies, error: SplitfireError, *, only_waiting: bool) -> None:
        for decode in self._decodes.of(replies, None):
            if decode.job.spec.seq_id not in self._decodes:  # went with another choice of its prompt
                continue
            if decode.intake is None or decode.joined_at is not None:
                if not (only_waiting and (decode.has_started or decode.began is not None or decode.joined_at is not None)):
                    self._drop(decode)
                    decode.job.refuse(error)
            elif not (only_waiting and decode.intake.has_begun):
                for waiting in self._waiting_for(decode.intake):
                    self._drop(waiting)
                decode.intake.job.refuse(error)  # as one: the router may have the prompt sent elsewhere

    def cancel(self, replies: Replies, attempt: int | None, choice: int | None = None) -> None:
        for decode in self._decodes.of(replies, attempt, choice):
            self._drop(decode)

    def _output(self, decode: _Decode, update: SequenceUpdate) -> fleet_pb2.SequenceOutput:
        job = decode.job
        output = fleet_pb2.SequenceOutput(
            attempt=job.attempt,
            choice=job.choice,
            offset=update.offset,
            token_ids=[token.token_id for token in update.tokens],
            logprobs=[logprobs for token in update.tokens if (logprobs := logprobs_to_wire(token)) is not None],
            draft_tokens=update.num_drafted,
            accepted_offsets=range(update.offset, update.offset + update.num_accepted),
        )
        if decode.first is not None:
            first, decode.first = decode.first, None
            output.offset = first.offset
            output.token_ids.insert(0, first.token_id)
            if output.logprobs:
                output.logprobs.insert(0, first.logprobs)
        if decode.began is None:
            output.timing.CopyFrom(self._begin(decode, update))
        else:
            decode.num_drafted += update.num_drafted
        return output

    def _begin(self, decode: _Decode, update: SequenceUpdate) -> fleet_pb2.WorkerTiming:
        """A prompt's first token, if that is computed here; then, or at once, the first token after it: how long it took to get there."""
        job, context, now = decode.job, self._context, self._context.clock()
        intake = decode.intake
        if update.times is not None and intake is None:
            decode.told_at = now
            started, done = update.times.started or job.received_at, update.times.prompt_done or now
            context.telemetry.record("prefill", job.traceparent, started, done)
            return context.teller.prompt(job.received_at, update.times, now, update.num_cached)
        step = context.host.latest
        decode.began, decode.spent = now, step.spent
        decode.busy_s = step.duration_s * (1 + update.num_drafted) / max(1, step.num_rows)
        cached, unpack_s = 0, None
        if intake is not None:
            cached, unpack_s = intake.num_cached_tokens, intake.receiver.unpack_s
        if decode.joined_at is not None:
            context.telemetry.record("join", job.traceparent, decode.joined_at, now)
        since = decode.joined_at if decode.joined_at is not None else decode.told_at
        waited_s = now - since if since is not None else 0.0
        phases = context.teller.second(waited_s, step.duration_s, unpack_s)
        return fleet_pb2.WorkerTiming(phases=phases, cached_tokens=cached)

    def _finish(self, decode: _Decode, update: SequenceUpdate) -> None:
        job, context, now = decode.job, self._context, self._context.clock()
        self._decodes.remove(decode)
        began = decode.joined_at or decode.told_at or now
        spent = context.host.latest.spent.since(decode.spent)
        timing = fleet_pb2.WorkerTiming(busy_s=decode.busy_s)
        if decode.began is not None and spent.num_steps:
            timing.phases.extend(context.teller.rest(spent, now - decode.began))
            timing.busy_s += spent.row_s * (1 + decode.num_drafted / spent.num_steps)
        num_tokens = update.offset + len(update.tokens) - len(job.spec.output)
        context.telemetry.record("decode", job.traceparent, began, now, {"gen_ai.usage.output_tokens": num_tokens})
        reason = inference_pb2.FINISH_REASON_STOP if update.stopped else inference_pb2.FINISH_REASON_LENGTH
        finished = fleet_pb2.Finished(attempt=job.attempt, choice=job.choice, reason=reason, timing=timing)
        if decode.kv_transfer is not None:
            finished.kv_transfer.CopyFrom(decode.kv_transfer)
        job.replies.finished(finished)

    def _on_joined(self, intake: Intake, firsts: Mapping[SeqId, kv_pb2.FirstToken]) -> list[SeqId]:
        """Choices that go on here. One without a first token ended with it, and is cancelled already, or soon."""
        receiver = intake.receiver
        self._context.tally.received(receiver.bytes_received)
        kv_transfer = inference_pb2.KvTransfer(
            transport=self._context.agent.transport.name,
            bytes=receiver.bytes_received,
            blocks=receiver.num_blocks_received,
            duration_s=max(0.0, (receiver.done_at or 0.0) - (receiver.wanted_at or receiver.done_at or 0.0)),
        )
        joining = []
        for decode in self._waiting_for(intake):
            job = decode.job
            first = firsts.get(job.spec.seq_id)
            if first is None:
                self._decodes.remove(decode)
                job.refuse(Unavailable("the hand-off brought no first token", reason="bad_first_token"))
                continue
            joining.append(job.spec.seq_id)
            decode.intake, decode.first, decode.joined_at, decode.kv_transfer = intake, first, self._context.clock(), kv_transfer
        return joining

    def _on_failed(self, intake: Intake, reason: str, is_retryable: bool) -> None:
        job = intake.job
        self._context.tally.not_received(reason)
        for decode in self._waiting_for(intake):
            self._decodes.remove(decode)
        if reason == WITHDRAWN:  # the prefill worker has told the router why
            return
        error: SplitfireError
        if reason == "kv_digest_mismatch":
            error = DataLoss("KV arrived corrupt", reason=reason)
        elif reason == NO_ROOM:
            error = Unavailable("no free KV blocks for too long", reason="handoff_no_room")
        elif not is_retryable:
            error = Mismatch(f"the hand-off is not possible: {reason}", reason="handoff_refused")
        else:
            error = Unavailable(f"the hand-off did not happen: {reason}", reason="handoff_failed")
        job.refuse(error, is_retryable=is_retryable)

    def _drop(self, decode: _Decode) -> None:
        """Ends a job without a reply; what it holds is free now, or with the engine's next turn."""
        self._decodes.remove(decode)
        if decode.intake is None or decode.joined_at is not None:
            self._context.host.finish(decode.job.spec.seq_id)
        elif not self._waiting_for(decode.intake):  # the last of its prompt's choices
            self._context.tally.not_received(WITHDRAWN)
            decode.intake.cancel()

    def _waiting_for(self, intake: Intake) -> list[_Decode]:
        """Choices that are still wanted of those that share it."""
        known = (self._decodes.get(fork.seq_id) for fork in intake.job.spec.choices)
        return [decode for decode in known if decode is not None]
