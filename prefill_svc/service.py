"""Policy of the prefill role: one record per job, from submit to the end of its hold. io thread."""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.protocol import WITHDRAWN
from kvtransfer.sender import Outcome
from prefill_svc.ship import BlockShipment
from splitfire.core.errors import Internal, InvalidInput, SplitfireError, Unavailable
from splitfire.engine.engine import SequenceUpdate
from splitfire.engine.sequence import SeqId, SequenceTimes
from splitfire.v1 import fleet_pb2, inference_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Job, JobTable, Replies, logprobs_to_wire


@dataclass(slots=True)
class _Prefill:
    """`is_over` once its last reply was given or is not owed."""

    job: Job
    shipment: BlockShipment | None = None
    is_over: bool = False


class PrefillService:
    """Computes prompts and hands them over. Holds a job's blocks from its first chunk until the receiver has them."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._prefills: JobTable[_Prefill] = JobTable()

    @property
    def num_jobs(self) -> int:
        return len(self._prefills)

    def owns(self, seq_id: SeqId) -> bool:
        return seq_id in self._prefills

    def submit(self, job: Job) -> None:
        if job.handoff is None and job.spec.stopping.max_tokens - len(job.spec.output) > 1:
            raise InvalidInput("handoff", "a prompt with more than one token to follow needs one")
        self._prefills.add(_Prefill(job))
        self._context.host.add(job.spec)

    def on_started(self, seq_id: SeqId) -> None:
        prefill = self._prefills.get(seq_id)
        if prefill is not None and prefill.job.handoff is not None and prefill.shipment is None:
            prefill.shipment = BlockShipment(self._context, prefill.job, prefill.job.handoff, self._on_closed)

    def on_update(self, update: SequenceUpdate) -> None:
        prefill = self._prefills.get(update.seq_id)
        if prefill is None:
            return
        job = prefill.job
        if update.error:
            self._end(prefill)
            job.refuse(Internal("the model's output for this request cannot be used", reason=update.error))
            return
        if update.token is not None:
            self._send_first_token(job, update)
        if update.is_finished:  # the first token ends the request, or nothing was to follow
            self._end(prefill)
            reason = inference_pb2.FINISH_REASON_STOP if update.stopped else inference_pb2.FINISH_REASON_LENGTH
            job.replies.finished(fleet_pb2.Finished(attempt=job.attempt, reason=reason))
        elif prefill.shipment is not None:
            prefill.shipment.advance(update)

    def fail(self, seq_id: SeqId, error: SplitfireError) -> None:
        prefill = self._prefills.get(seq_id)
        if prefill is not None:
            self._end(prefill)
            prefill.job.refuse(error)

    def cancel(self, replies: Replies, attempt: int | None) -> None:
        for prefill in self._prefills.of(replies, attempt):
            self._end(prefill)

    def _send_first_token(self, job: Job, update: SequenceUpdate) -> None:
        token, times, context = update.token, update.times, self._context
        assert token is not None
        assert times is not None
        sampled_at = times.prompt_done or 0.0
        logprobs = logprobs_to_wire(token)
        output = fleet_pb2.SequenceOutput(
            attempt=job.attempt,
            offset=update.offset,
            token_ids=[token.token_id],
            logprobs=[logprobs] if logprobs is not None else [],
            timing=fleet_pb2.WorkerTiming(phases=self._phases(job, times), cached_tokens=update.num_cached),
        )
        job.replies.output(output)
        attributes: dict[str, str | int | float | bool] = {"splitfire.request_id": job.request_id, "splitfire.attempt": job.attempt}
        computed = job.spec.num_tokens - update.num_cached
        context.telemetry.record(
            "prefill",
            job.traceparent,
            times.started or job.received_at,
            sampled_at,
            {**attributes, "gen_ai.usage.input_tokens": computed, "gen_ai.usage.cache_read.input_tokens": update.num_cached},
        )
        context.telemetry.record("first_token", job.traceparent, sampled_at, context.clock(), attributes)

    def _phases(self, job: Job, times: SequenceTimes) -> list[inference_pb2.Phase]:
        started, done = times.started or job.received_at, times.prompt_done or 0.0
        phases = [self._context.phase(job, "prefill-queue", job.received_at, started)]
        phases.append(self._context.phase(job, "prefill", started, done))
        return phases

    def _on_closed(self, shipment: BlockShipment, outcome: Outcome, reason: str) -> None:
        job, context = shipment.job, self._context
        now = context.clock()
        context.telemetry.record(
            "ship",
            job.traceparent,
            shipment.began,
            now,
            {
                "splitfire.outcome": outcome.value,
                "splitfire.kv_bytes": shipment.sender.bytes_sent,
                "splitfire.request_id": job.request_id,
            },
        )
        prefill = self._prefills.get(job.spec.seq_id)
        if prefill is None or prefill.is_over:
            return
        self._end(prefill)
        if outcome is Outcome.RECEIVED:
            timing = fleet_pb2.WorkerTiming(phases=[context.phase(job, "ship", shipment.began, now)])
            job.replies.finished(fleet_pb2.Finished(attempt=job.attempt, timing=timing))
        elif outcome is Outcome.ABORTED:  # if it was the receiver's word, the router hears it from there
            job.refuse(Unavailable(f"the hand-off did not happen: {reason}", reason=f"handoff_{outcome.value}"))

    def _end(self, prefill: _Prefill) -> None:
        """Blocks are free with the engine's next turn; a transfer under way is withdrawn."""
        prefill.is_over = True
        if prefill.shipment is not None:
            prefill.shipment.withdraw(WITHDRAWN)
        self._prefills.remove(prefill)
        self._context.host.finish(prefill.job.spec.seq_id)
