"""One answer of a request: what was asked, what has come, and when. Filled by the flow, emptied by the client's stream.

Token ids are ordered by offset whoever sends them: an equal duplicate is dropped (decode repeats the first token), a
different one or a gap is the worker's error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.retries import Tries
from router.timeline import Timeline
from splitfire.core.hashing import BlockHash
from splitfire.core.lifecycle import REQUEST, Req, ReqEvent, advance
from splitfire.core.response_format import OutputGrammar
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.wire import trace_id_of
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

    @property
    def trace_id(self) -> str:
        """Empty when tracing is off."""
        return trace_id_of(self.traceparent)


class Choice:
    """One answer. The flow fills it, the client's stream empties it; `changed` is set whenever there is something new."""

    def __init__(self, plan: RequestPlan, index: int, changed: asyncio.Event) -> None:
        self.plan = plan
        self.index = index
        self.state = Req.ACCEPTED
        self.ids: list[int] = []  # at most max_tokens, so bounded
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.draft_tokens = 0  # of all its attempts, as far as they told
        self.accepted_offsets: list[int] = []  # of tokens that were drafts: rising, as far as workers told
        self.finish_reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
        self.timeline = Timeline(plan.accepted_at)
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
        if output.accepted_offsets:
            self.accepted_offsets += (at for at in output.accepted_offsets if offset + overlap <= at < len(self.ids))
        if fresh:
            self._changed.set()
        return ""

    def finish(self, reason: inference_pb2.FinishReason.ValueType) -> None:
        self.finish_reason = reason
        self._changed.set()
