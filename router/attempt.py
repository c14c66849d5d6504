"""One try of one choice at the workers it was placed on: their frames in, one end out.

A hand-off that fails while the prompt is still held costs no attempt: the prompt goes to another decode worker, at most
MAX_REDIRECTS times, and nothing is computed again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from router.choice import Choice
from router.fleet import Fleet
from router.placement import Placement
from splitfire.core import limits
from splitfire.core.errors import Code, DataLoss, Internal, SplitfireError, Unavailable
from splitfire.core.lifecycle import ReqEvent
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
# What a worker may say of a request that the router let through; anything else not worth a retry is a bug.
WORKERS_WORD = (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED)


class Attempt:
    """One try of one choice at the workers it was placed on. Ends once, with None (finished) or the error. `find_decode` names
    another decode worker for its prompt, and sends it there."""

    def __init__(
        self, choice: Choice, placement: Placement, fleet: Fleet, vocab_size: int, find_decode: Callable[[Attempt], bool]
    ) -> None:
        self.choice = choice
        self.placement = placement
        self.transfer_id = b""  # of the hand-off under way
        self.ended: asyncio.Future[SplitfireError | None] = asyncio.get_running_loop().create_future()
        self.resumed_at = len(choice.ids)
        self._fleet = fleet
        self._vocab_size = vocab_size
        self._find_decode = find_decode
        self._num_redirects = 0
        self._is_prefill_over = placement.prefill is None
        self._has_decoded = False
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
            self._fleet.strike(incarnation, "worker_protocol_error")
            self._fail(Unavailable("a worker broke the protocol", reason="worker_protocol_error"), incarnation)
            return
        if output.HasField("timing"):
            choice.timeline.worker_phases.extend(output.timing.phases)
            if incarnation == (self.placement.prefill or self.placement.decode):  # what was not computed, not what did not move
                choice.timeline.cached_tokens = output.timing.cached_tokens
        if had == self.resumed_at and len(choice.ids) > had:
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
        elif incarnation == self.placement.prefill:
            self._is_prefill_over = True
            self._fleet.end(self.number, incarnation, None)
            if finished.transfer_id != self.transfer_id:  # shipped, but to the worker whose loss made us redirect it
                self._fail(Unavailable("a worker was lost", reason="no_decode"))

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None:
        if refused.is_held and refused.transfer_id != self.transfer_id:
            return  # of a hand-off that was given up already
        if not refused.is_held:
            self._fleet.end(self.number, incarnation, None)
        if incarnation == self.placement.prefill and (self._is_prefill_over or self._has_decoded):
            return  # decode has everything: what prefill thinks of it does not matter any more
        if refused.reason in ("handoff_failed", "handoff_aborted") and self.placement.prefill and self.placement.decode:
            self._fleet.avoid_pair(self.placement.prefill, self.placement.decode)
        is_of_decode = refused.is_held or (incarnation == self.placement.decode and refused.is_retryable)
        if is_of_decode and refused.reason != "kv_digest_mismatch" and self._redirect():
            return
        error = SplitfireError(refused.message, reason=refused.reason)
        if refused.reason == "kv_digest_mismatch":
            error = DataLoss(refused.message, reason=refused.reason)
        elif refused.is_retryable:
            error = Unavailable(refused.message, reason=refused.reason)
        elif refused.code in WORKERS_WORD:
            error.code = Code(refused.code)
        else:
            error = Internal(refused.message, reason=refused.reason)
        error.is_retryable = refused.is_retryable
        is_of_both = refused.reason.startswith(("handoff", "kv_"))
        self._fail(error, *((self.placement.prefill, self.placement.decode) if is_of_both else (incarnation,)))

    def on_lost(self, incarnation: bytes) -> None:
        if incarnation == self.placement.prefill and (self._is_prefill_over or self._has_decoded):
            return
        if incarnation == self.placement.decode and self._redirect():
            return
        if incarnation == self.placement.prefill and self.transfer_id and self._fleet.has(self.number, self.placement.decode):
            self._is_prefill_over = True  # decode hears of it too: it has all the KV and goes on, or says that it cannot
            return
        reason = "no_decode" if incarnation == self.placement.decode else "no_prefill"
        self._fail(Unavailable("a worker was lost", reason=reason), incarnation)

    def _redirect(self) -> bool:
        """Whether another decode worker takes the prompt, which its prefill worker still has."""
        can_move = not (self._is_prefill_over or self._has_decoded or self.ended.done() or self.choice.is_finished)
        if not can_move or self._num_redirects >= limits.MAX_REDIRECTS or not self.transfer_id:
            return False
        assert self.placement.decode is not None
        self.choice.failed_at.add(self.placement.decode)
        self._num_redirects += 1
        return self._find_decode(self)

    def _fail(self, error: SplitfireError, *incarnations: bytes | None) -> None:
        """The next attempt avoids these workers, if there are others."""
        if not self.ended.done():
            self.choice.failed_at.update(filter(None, incarnations))
        self.end(error)
