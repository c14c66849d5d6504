"""One try of a choice, or of several that share their prompt, at the workers it was placed on: their frames in, one end out for
each choice.

A hand-off that fails while the prompt is still held costs no attempt: the prompt goes to another decode worker, at most
MAX_REDIRECTS times, and nothing is computed again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from router.choice import Choice
from router.ejection import is_workers_fault
from router.fleet import Fleet
from router.placing import Room
from router.retries import WorkerLost
from router.timeline import believed_s
from splitfire.core import limits
from splitfire.core.errors import Code, DataLoss, Internal, SplitfireError, Unavailable
from splitfire.core.lifecycle import ReqEvent
from splitfire.v1 import fleet_pb2, inference_pb2

log = structlog.get_logger("router")
MAX_OUTCOMES = 32  # of hand-offs that are told apart
CHARGED_AT = 16  # tokens
# Refusals by which two workers cannot, or cannot now, exchange KV, though both live.
PAIR_BROKE = frozenset(
    (
        "handoff_failed",
        "handoff_aborted",
        "handoff_unreachable",
        "handoff_no_common_transport",
        "handoff_ucx_version",
        "handoff_too_many_peers",
    )
)
# What a worker may say of a request that the router let through; anything else not worth a retry is a bug.
WORKERS_WORD = (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED)


class Attempt:
    """One try at the workers it was placed on. Ends once for each choice, with None (finished) or the error. `find_decode` names
    another decode worker for its prompt, and sends it there."""

    def __init__(
        self,
        choices: Sequence[Choice],
        room: Room,
        fleet: Fleet,
        vocab_size: int,
        find_decode: Callable[[Attempt], bool],
    ) -> None:
        self.choices = {choice.index: choice for choice in choices}  # those that have not ended
        self.placement = room.placement
        self.work = room.work
        self.block_hashes = room.block_hashes
        self.is_dispatched = False
        self.transfer_id = b""  # of the hand-off under way
        self.charge: Callable[[int], None] = lambda num_tokens: None  # told of tokens that came, CHARGED_AT at a time
        self.resumed_at = len(choices[0].ids)  # where there are several, none has a token yet
        loop = asyncio.get_running_loop()
        self._ends: dict[int, asyncio.Future[SplitfireError | None]] = {c.index: loop.create_future() for c in choices}
        self._fleet = fleet
        self._vocab_size = vocab_size
        self._find_decode = find_decode
        self._num_redirects = 0
        self._num_uncharged = 0
        self._is_prefill_over = room.placement.prefill is None
        self._has_decoded = False
        self._lost_prefill: WorkerLost | None = None  # before decode said whether it has everything
        self.number = fleet.begin(room.placement, room.work, self, room.block_names)

    @property
    def num_choices(self) -> int:
        return len(self.choices)

    def ended(self, choice: Choice) -> asyncio.Future[SplitfireError | None]:
        """How it ends for one of its choices."""
        return self._ends[choice.index]

    def end(self, error: SplitfireError | None, cancel_reason: str | None = "attempt over") -> None:
        """Over for all, at every worker that still has it."""
        if not self.choices:
            return
        for choice in list(self.choices.values()):
            self._close(choice, error)
        self._fleet.end(self.number, None, cancel_reason, self.placement)

    def leave(
        self, choice: Choice, error: SplitfireError | None = None, reason: str = "attempt over", *, at: bytes | None = None
    ) -> None:
        """Over for one of its choices; a worker `at` which it ended knows."""
        if choice.index not in self.choices:
            return
        self._close(choice, error)
        if self.choices:
            self._fleet.cancel_choice(self.number, choice.index, reason, self.placement, but_at=at)
            return
        if at is not None:
            self._fleet.end(self.number, at, None)
        self._fleet.end(self.number, None, reason, self.placement)

    # -- AttemptEvents

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None:
        choice = self.choices.get(output.choice)
        if choice is None and output.choice in self._ends:
            return  # over, and the worker does not know yet
        had = len(choice.ids) if choice is not None else 0
        broken = choice.append(output, self._vocab_size) if choice is not None else f"tokens for choice {output.choice}"
        if choice is None or broken:
            plan = next(iter(self.choices.values())).plan
            log.error("worker broke the protocol", request_id=plan.request_id, trace_id=plan.trace_id, detail=broken)
            self._fleet.strike(incarnation, "worker_protocol_error")
            self._fail(Unavailable("a worker broke the protocol", reason="worker_protocol_error"), incarnation)
            return
        if had < 2 or had == self.resumed_at or output.HasField("timing"):
            self._account(incarnation, choice, output, had)
        self._num_uncharged += len(choice.ids) - had
        if self._num_uncharged >= CHARGED_AT:
            self.charge(self._num_uncharged)
            self._num_uncharged = 0
        if had == self.resumed_at and len(choice.ids) > had:
            self._fleet.started(self.number, self.placement)
            choice.advance(ReqEvent.TOKEN)
        if incarnation == self.placement.decode and not self._has_decoded:
            self._has_decoded = True
            self._fleet.arrived(self.number, incarnation)

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None:
        if finished.reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
            choice = self.choices.get(finished.choice)
            if choice is None:
                return
            choice.timeline.finished(finished.timing.phases)
            choice.timeline.decode_busy_s += believed_s(finished.timing.busy_s)
            if finished.HasField("kv_transfer"):
                choice.timeline.kv_transfer = finished.kv_transfer
            choice.finish(finished.reason)
            if incarnation == self.placement.decode and self._fleet.has(self.number, self.placement.prefill):
                # The answer is complete, what prefill measured is not: its last frame is under way.
                loop = asyncio.get_running_loop()
                loop.call_later(limits.PREFILL_TIMES_WAIT_S, partial(self.leave, choice, at=incarnation))
                return
            self.leave(choice, at=incarnation)
        elif incarnation == self.placement.prefill:
            for choice in self.choices.values():
                choice.timeline.shipped(finished.timing.phases)
            self._is_prefill_over = True
            if finished.transfer_id:
                self._fleet.handoffs["received"] += 1
            self._fleet.end(self.number, incarnation, None)
            if finished.transfer_id != self.transfer_id:  # shipped, but to the worker whose loss made us redirect it
                self._fail(Unavailable("a worker was lost", reason="no_decode"))
            self._leave_finished()

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None:
        if refused.is_held and refused.transfer_id != self.transfer_id:
            return  # of a hand-off that was given up already
        if refused.reason.startswith(("handoff", "kv_")) and len(self._fleet.handoffs) < MAX_OUTCOMES:
            self._fleet.handoffs[refused.reason] += 1
        is_of_one = refused.HasField("choice")
        if not refused.is_held and not is_of_one:
            self._fleet.end(self.number, incarnation, None)
        if incarnation == self.placement.prefill and (self._is_prefill_over or self._has_decoded):
            self._leave_finished()
            return  # decode has everything: what prefill thinks of it does not matter any more
        error = _error_of(refused)
        if self._lost_prefill is not None and incarnation == self.placement.decode and refused.reason.startswith("handoff"):
            self._fail(self._lost_prefill, self.placement.prefill)  # which is why
            return
        if is_of_one:
            if (choice := self.choices.get(refused.choice)) is not None:
                choice.failed_at.add(incarnation)
                self.leave(choice, error, at=incarnation)
            return
        if refused.reason in PAIR_BROKE and self.placement.prefill and self.placement.decode:
            self._fleet.avoid_pair(self.placement.prefill, self.placement.decode)
        is_of_decode = refused.is_held or (incarnation == self.placement.decode and refused.is_retryable)
        receiver = self.placement.decode
        if is_of_decode and refused.reason != "kv_digest_mismatch" and self._redirect():
            if receiver is not None and is_workers_fault(error):
                self._fleet.guard.failed(self.number, [receiver])
            return
        is_of_both = refused.reason.startswith(("handoff", "kv_"))
        self._fail(error, *((self.placement.prefill, self.placement.decode) if is_of_both else (incarnation,)))

    def on_lost(self, incarnation: bytes, *, is_death: bool) -> None:
        if incarnation == self.placement.prefill and (self._is_prefill_over or self._has_decoded):
            self._leave_finished()
            return
        if incarnation == self.placement.decode and self._redirect():
            return
        if incarnation == self.placement.prefill and self.transfer_id and self._fleet.has(self.number, self.placement.decode):
            self._is_prefill_over = True  # decode hears of it too: it has all the KV and goes on, or says that it cannot
            self._lost_prefill = WorkerLost("no_prefill", is_death=is_death, was_computing=True)
            return
        reason = "no_decode" if incarnation == self.placement.decode else "no_prefill"
        was_computing = self._has_decoded or incarnation == self.placement.computing
        self._fail(WorkerLost(reason, is_death=is_death, was_computing=was_computing), incarnation)

    # -- inside

    def _account(self, incarnation: bytes, choice: Choice, output: fleet_pb2.SequenceOutput, had: int) -> None:
        """Where its time went, as far as the worker says."""
        timeline, timing = choice.timeline, output.timing
        timeline.told(timing.phases, had, len(choice.ids), time.monotonic())
        has_prompt = any(phase.leg == inference_pb2.LEG_FIRST_TOKEN for phase in timing.phases)
        if has_prompt and incarnation == self.placement.computing:  # what was not computed, not what did not move
            timeline.cached_tokens = timing.cached_tokens
            timeline.prefill_busy_s += believed_s(timing.busy_s)
            self._fleet.computed(self.number, incarnation, self.work, timing)

    def _redirect(self) -> bool:
        """Whether another decode worker takes the prompt, which its prefill worker still has."""
        is_wanted = any(not choice.is_finished for choice in self.choices.values())
        can_move = is_wanted and not (self._is_prefill_over or self._has_decoded)
        if not can_move or self._num_redirects >= limits.MAX_REDIRECTS or not self.transfer_id:
            return False
        assert self.placement.decode is not None
        for choice in self.choices.values():
            choice.failed_at.add(self.placement.decode)
        self._num_redirects += 1
        return self._find_decode(self)

    def _leave_finished(self) -> None:
        """Prefill will say no more, which is all that finished choices waited for."""
        for choice in [c for c in self.choices.values() if c.is_finished]:
            self.leave(choice, at=self.placement.decode)

    def _fail(self, error: SplitfireError, *incarnations: bytes | None) -> None:
        """The next attempts avoid these workers, if there are others."""
        for choice in self.choices.values():
            choice.failed_at.update(filter(None, incarnations))
        self.end(error)

    def _close(self, choice: Choice, error: SplitfireError | None) -> None:
        del self.choices[choice.index]
        if not self.choices and self._num_uncharged:
            self.charge(self._num_uncharged)
        self._ends[choice.index].set_result(error)


def _error_of(refused: fleet_pb2.Refused) -> SplitfireError:
    """What a worker's refusal means to the request."""
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
    return error
