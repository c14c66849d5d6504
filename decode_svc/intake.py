"""Intake: the agent's Sink for one job, from offer to join. io thread.

Touches only RESERVED blocks, which no running sequence can see; `join` is the only thing that waits for a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvtransfer.expectation import Expectation, Room
from kvtransfer.frames import DIGEST_OFF, DIGEST_SUM64
from kvtransfer.receiver import Receiver
from splitfire.core.hashing import hash_blocks
from splitfire.engine.device.handoff import on_handoff_stream
from splitfire.engine.lending import Reservation
from splitfire.engine.parallel.pack import unpack
from splitfire.engine.sequence import SeqId
from splitfire.v1 import kv_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Handoff, Job
from splitfire.worker.transports import slot_tensor


class Intake:
    """Ends with exactly one call: `on_joined` (the engine gets what this returns) or `on_failed` (nothing is held)."""

    def __init__(
        self,
        context: WorkerContext,
        job: Job,
        handoff: Handoff,
        on_joined: Callable[[Intake, Mapping[SeqId, kv_pb2.FirstToken]], Sequence[SeqId]],
        on_failed: Callable[[Intake, str, bool], None],
    ) -> None:
        self.job = job
        self._context = context
        self._on_joined = on_joined
        self._on_failed = on_failed
        self._reservation: Reservation | None = None
        self._names = job.spec.block_hashes or hash_blocks(
            job.spec.hash_root, (*job.spec.prompt, *job.spec.output), context.layout.block_size
        )
        self._is_over = False
        expectation = Expectation(
            transfer_id=handoff.transfer_id,
            token=handoff.token,
            incarnation=handoff.peer.incarnation,
            num_tokens=job.spec.num_tokens,
            layout=context.layout,
            fingerprint=context.agent.fingerprint,
            rank=2 * job.spec.priority + bool(job.spec.output),  # within a class, what was interrupted goes first
            digest_algorithm=DIGEST_SUM64 if context.kv_digest else DIGEST_OFF,
        )
        self.receiver: Receiver = context.agent.expect(expectation, handoff.peer, self)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that did not have to move."""
        return self._reservation.num_pinned * self._context.layout.block_size if self._reservation is not None else 0

    @property
    def has_begun(self) -> bool:
        """Room is kept for it."""
        return self._reservation is not None

    def cancel(self) -> None:
        """The request is over: blocks are free when this returns."""
        self._is_over = True
        self.receiver.close("request ended", is_retryable=False)

    # -- Sink

    def reserve(self) -> int | Room:
        self._reservation = self._context.host.engine.lending.reserve(self.job.spec)
        return Room.NOT_NOW if self._reservation is None else self._reservation.num_pinned

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        reservation = self._reservation
        assert reservation is not None
        ids = reservation.block_ids[first_block : first_block + num_blocks]
        pool = self._context.host.engine.runner.pool
        with on_handoff_stream(pool.raw.device):
            return unpack(pool, ids, slot_tensor(blocks), digest=self._context.kv_digest)

    def publish(self, first_block: int, num_blocks: int) -> None:
        reservation = self._reservation
        assert reservation is not None
        self._context.host.engine.lending.commit(reservation, first_block, num_blocks, self._names)

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        reservation = self._reservation
        assert reservation is not None
        spec, vocab_size = self.job.spec, self._context.host.engine.runner.model.config.vocab_size
        good = {t.choice: t for t in first_tokens if t.offset == len(spec.output) and t.token_id < vocab_size}
        firsts = {fork.seq_id: good[fork.choice] for fork in spec.choices if fork.choice in good}
        if not firsts:
            self.closed("bad_first_token", is_retryable=True)
            return
        joining = self._on_joined(self, firsts)
        if joining:
            self._context.host.join(reservation, {seq_id: firsts[seq_id].token_id for seq_id in joining})
        else:
            self.revoked()

    def revoked(self) -> None:
        if self._reservation is not None:
            self._context.host.engine.lending.forfeit(self._reservation)
            self._reservation = None

    def closed(self, reason: str, is_retryable: bool) -> None:
        self.revoked()
        if not self._is_over:
            self._is_over = True
            self._on_failed(self, reason, is_retryable)
