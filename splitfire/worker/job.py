"""A job: one attempt of one request at this worker, as a router submitted it. Checked again here before it is taken."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from kvtransfer.peers import PeerAddress
from splitfire.core.errors import ExceedsContext, ExceedsPool, Internal, InvalidInput, SplitfireError, Unavailable, Unsupported
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.hashing import HASH_BYTES, BlockHash, chain_root
from splitfire.core.layout import KvLayout
from splitfire.core.limits import MAX_N
from splitfire.core.ranges import check_sampling, check_stopping, check_token_ids, require
from splitfire.core.wire import sampling_from_wire, stopping_from_wire
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.sequence import Fork, Purpose, SeqId, SequenceSpec
from splitfire.v1 import fleet_pb2, inference_pb2

_seq_ids = itertools.count()
CONSTRAINT_FAILURES = {
    "constraint_dead_end": "no token of the model may follow the output so far",
    "constraint_too_complex": "there are too many ways to read the output so far; make it less ambiguous",
}


class Replies(Protocol):
    """Where a job's results go: the stream of the router that submitted it."""

    def output(self, output: fleet_pb2.SequenceOutput) -> None: ...

    def finished(self, finished: fleet_pb2.Finished) -> None:
        """The attempt's last word, if it did what it was asked for."""

    def refused(self, refused: fleet_pb2.Refused) -> None:
        """The attempt's last word, if it did not."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """The other end of a transfer and the secret both ends know."""

    transfer_id: bytes
    token: bytes
    peer: PeerAddress


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt, of one choice or of several that share their prompt. `received_at` is this process's monotonic clock; worker
    timings count from it."""

    replies: Replies
    attempt: int
    part: int
    spec: SequenceSpec
    handoff: Handoff | None
    traceparent: str
    request_id: str
    received_at: float
    is_member: bool = False  # one choice of several

    @property
    def choice(self) -> int:
        return self.spec.choice

    def members(self) -> tuple[Job, ...]:
        """Each choice for itself."""
        if not self.spec.forks:
            return (self,)
        return tuple(replace(self, spec=self.spec.alone(fork), is_member=True) for fork in self.spec.forks)

    def refuse(self, error: SplitfireError, *, is_retryable: bool | None = None) -> None:
        retry = error.is_retryable if is_retryable is None else is_retryable
        refused = refusal(self.attempt, error, is_retryable=retry)
        if self.is_member:
            refused.choice = self.choice
        self.replies.refused(refused)


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What this worker can take."""

    vocab_size: int
    max_context: int
    num_blocks: int
    layout: KvLayout
    fingerprint: Fingerprint
    transport: str = "ucx"


class HasJob(Protocol):
    """A service's own record of a job."""

    @property
    def job(self) -> Job: ...


Record = TypeVar("Record", bound=HasJob)


class JobTable(Generic[Record]):
    """The records of a service's open jobs, by sequence and by attempt."""

    def __init__(self) -> None:
        self._records: dict[SeqId, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._records

    def add(self, record: Record) -> None:
        self._records[record.job.spec.seq_id] = record

    def get(self, seq_id: SeqId) -> Record | None:
        return self._records.get(seq_id)

    def remove(self, record: Record) -> None:
        self._records.pop(record.job.spec.seq_id, None)

    def of(self, replies: Replies, attempt: int | None, choice: int | None = None) -> list[Record]:
        """Those of one router: one attempt, or (None) all; of an attempt one choice, or (None) all."""
        mine = [r for r in self._records.values() if r.job.replies is replies and attempt in (None, r.job.attempt)]
        return [r for r in mine if choice in (None, r.job.choice)]


def failure(reason: str) -> SplitfireError:
    """The error of a sequence that the engine could not go on with."""
    said = CONSTRAINT_FAILURES.get(reason)
    if said is not None:
        return InvalidInput("response_format", said, reason=reason)
    return Internal("the model's output for this request cannot be used", reason=reason)


def refusal(attempt: int, error: SplitfireError, *, is_retryable: bool) -> fleet_pb2.Refused:
    return fleet_pb2.Refused(attempt=attempt, code=error.code, reason=error.reason, message=str(error), is_retryable=is_retryable)


def make_job(submit: fleet_pb2.Submit, replies: Replies, limits: JobLimits, received_at: float) -> Job:
    """The job, or the error that refuses it. A router that was checked by the same validator never sees one."""
    sampling, stopping = sampling_from_wire(submit.sampling), stopping_from_wire(submit.stopping)
    check_sampling(sampling, limits.vocab_size)
    check_stopping(stopping, limits.vocab_size)
    prompt, output = tuple(submit.prompt_token_ids), tuple(submit.output_token_ids)
    check_token_ids("prompt_token_ids", prompt, limits.vocab_size)
    check_token_ids("output_token_ids", output, limits.vocab_size)
    predicted = tuple(submit.predicted_token_ids)
    check_token_ids("predicted_token_ids", predicted, limits.vocab_size)
    require(
        len(predicted) <= limits.max_context, "predicted_token_ids", f"{len(predicted)} of them", f"at most {limits.max_context}"
    )
    if not prompt:
        raise InvalidInput("prompt", "must not be empty")
    if len(prompt) + stopping.max_tokens > limits.max_context:
        raise ExceedsContext(
            "stopping.max_tokens", f"is {stopping.max_tokens} after {len(prompt)} tokens, limit {limits.max_context}"
        )
    if len(output) >= stopping.max_tokens:
        raise InvalidInput("output_token_ids", f"has {len(output)} tokens, max_tokens is {stopping.max_tokens}")
    if limits.layout.blocks_for(len(prompt) + stopping.max_tokens) > limits.num_blocks:
        raise ExceedsPool("stopping.max_tokens", f"needs more than the {limits.num_blocks} blocks of this worker")
    if submit.part not in fleet_pb2.Part.values()[1:]:
        raise Unsupported("part", f"{submit.part} is not known to this version")
    hashes = tuple(BlockHash(h) for h in submit.block_hashes)
    full = (len(prompt) + len(output)) // limits.layout.block_size
    if len(hashes) not in (0, full) or any(len(h) != HASH_BYTES for h in hashes):
        raise InvalidInput("block_hashes", f"{len(hashes)} of them do not fit {len(prompt) + len(output)} tokens")
    choices = (submit.choice, *submit.more_choices)
    if len(set(choices)) < len(choices) or len(choices) > MAX_N or (output and len(choices) > 1):
        raise InvalidInput("more_choices", f"{choices} are not at most {MAX_N} different ones without a token yet")
    if submit.more_choices and submit.HasField("grammar"):
        raise InvalidInput("more_choices", "must be empty with a grammar: that belongs to one sequence")
    spec = SequenceSpec(
        seq_id=SeqId(next(_seq_ids)),
        prompt=prompt,
        output=output,
        choice=submit.choice,
        sampling=sampling,
        stopping=stopping,
        purpose=Purpose.PREFILL if submit.part == fleet_pb2.PART_PREFILL else Purpose.GENERATE,
        hash_root=chain_root(submit.cache_salt, limits.fingerprint.digest, ""),
        block_hashes=hashes,
        priority=submit.priority,
        predicted=predicted,
        forks=tuple(Fork(SeqId(next(_seq_ids)), choice) for choice in choices) if submit.more_choices else (),
    )
    handoff = handoff_from_wire(submit.handoff, limits.transport) if submit.HasField("handoff") else None
    return Job(replies, submit.attempt, submit.part, spec, handoff, submit.traceparent, submit.request_id, received_at)


def logprobs_to_wire(token: SampledToken) -> inference_pb2.TokenLogprobs | None:
    """None when the request did not ask for them."""
    if token.logprob is None:
        return None
    chosen = inference_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob)
    return inference_pb2.TokenLogprobs(
        chosen=chosen, top=[inference_pb2.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top]
    )


def peer_address(peer: fleet_pb2.Peer, transport: str) -> PeerAddress:
    """Where to reach `peer` over the transport of that name."""
    for candidate in peer.transports:
        if candidate.name == transport:
            return PeerAddress(peer.worker_id, peer.incarnation, candidate.address)
    raise Unavailable(f"{peer.worker_id} does not speak {transport}", reason="handoff_no_common_transport")


def handoff_from_wire(handoff: fleet_pb2.Handoff, transport: str) -> Handoff:
    """The other end of a transfer, as the router names it."""
    if len(handoff.transfer_id) != 16 or len(handoff.token) != 16 or len(handoff.peer.incarnation) != 16:
        raise SplitfireError("handoff: ids and tokens have 16 bytes", reason="invalid_handoff")
    return Handoff(handoff.transfer_id, handoff.token, peer_address(handoff.peer, transport))
