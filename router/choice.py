"""One answer of a request: what was asked, what has come, and when. Filled by the flow, emptied by the client's stream.

Token ids are ordered by offset whoever sends them: an equal duplicate is dropped (decode repeats the first token), a
different one or a gap is the worker's error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router.retries import Tries
from splitfire.core.hashing import BlockHash
from splitfire.core.lifecycle import REQUEST, Req, ReqEvent, advance
from splitfire.core.response_format import OutputGrammar
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.v1 import fleet_pb2, inference_pb2


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
    predicted: tuple[int, ...] = ()  # what the answer will resemble, if the client said
    grammar: OutputGrammar | None = None  # what the output must match
    tenant: str = "default"
    weight: float = 1.0  # of the tenant's share
    max_running: int | None = None  # the tenant's, choices of requests
    cache_salt: bytes = b""  # the tenant's: requests of two tenants never share cached blocks


@dataclass(slots=True)
class Timeline:
    """Instants of one choice on this process's clock, and what workers measured, laid out from dispatch."""

    queued_at: float = 0.0
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
        self.draft_tokens = 0  # of all its attempts, as far as they told
        self.accepted_draft_tokens = 0
        self.finish_reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
        self.timeline = Timeline()
        self.failed_at: set[bytes] = set()  # incarnations of workers that an attempt failed at
        self.tries = Tries()
        self.hashed: tuple[bytes, int] | None = None  # the fingerprint, and of how many blocks, the next two are
        self.block_hashes: Sequence[BlockHash] = ()
        self.block_names: Sequence[int] = ()
        self.end_attempt: Callable[[str], None] = lambda reason: None  # ends what is under way at the workers
        self._changed = changed

    @property
    def has_ended(self) -> bool:
        """The last id is one that ends the answer, so there is nothing left to compute."""
        stopping = self.plan.stopping
        is_stop = bool(self.ids) and self.ids[-1] in stopping.stop_token_ids and len(self.ids) > stopping.min_tokens
        return is_stop or len(self.ids) >= stopping.max_tokens

    @property
    def is_finished(self) -> bool:
        """It is known why the answer ends where it does."""
        return self.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED

    def stop(self) -> None:
        """A stop string matched: what the workers still make of it is not wanted."""
        self.finish_reason = inference_pb2.FINISH_REASON_STOP
        self.end_attempt("stop string")

    def advance(self, event: ReqEvent) -> None:
        self.state = advance(REQUEST, self.state, event)

    def append(self, output: fleet_pb2.SequenceOutput, vocab_size: int) -> str:
        """Takes what is new; the reason when the worker broke the protocol, else empty."""
        offset, ids = output.offset, list(output.token_ids)
        known = len(self.ids) - offset
        if known < 0:
            return f"a gap: offset {offset} after {len(self.ids)} tokens"
        overlap = min(known, len(ids))
        if ids[:overlap] != self.ids[offset : offset + overlap]:
            return f"another token than before at offset {offset}"
        fresh = ids[overlap:]
        if max(fresh, default=0) >= vocab_size or len(self.ids) + len(fresh) > self.plan.stopping.max_tokens:
            return "a token id outside the vocabulary, or more tokens than asked for"
        if self.plan.sampling.logprobs is not None:
            if len(output.logprobs) != len(ids):
                return "tokens without their log-probabilities"
            self.logprobs.extend(output.logprobs[overlap:])
        self.ids.extend(fresh)
        self.draft_tokens += output.draft_tokens
        self.accepted_draft_tokens += output.accepted_draft_tokens
        if fresh:
            self._changed.set()
        return ""

    def finish(self, reason: inference_pb2.FinishReason.ValueType) -> None:
        self.finish_reason = reason
        self._changed.set()


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
