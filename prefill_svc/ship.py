"""One shipment: the blocks of one held prompt on their way to a decode worker. io thread.

Reads pool blocks while the engine thread computes others: a block is packed only when every token in it is computed, and
nobody writes to it again before the sequence is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.sender import Outcome, Sender, Shipment
from splitfire.engine.device.handoff import on_handoff_stream
from splitfire.engine.parallel.pack import pack
from splitfire.engine.updates import SequenceUpdate
from splitfire.v1 import kv_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Handoff, Job, logprobs_to_wire
from splitfire.worker.transports import slot_tensor


@dataclass(frozen=True, slots=True)
class Computed:
    """How far a held prompt has come: what there is to ship."""

    num_tokens: int = 0
    block_ids: Sequence[int] = ()
    firsts: Sequence[kv_pb2.FirstToken] = ()  # of the choices that go on; with them the prompt is complete


def first_token(choice: int, update: SequenceUpdate) -> kv_pb2.FirstToken:
    """What decode is told of a choice."""
    [token] = update.tokens
    return kv_pb2.FirstToken(choice=choice, offset=update.offset, token_id=token.token_id, logprobs=logprobs_to_wire(token))


class ShipmentOwner(Protocol):
    """Who is told what becomes of a shipment."""

    def on_granted(self, shipment: BlockShipment) -> None: ...

    def on_closed(self, shipment: BlockShipment, outcome: Outcome, reason: str) -> None:
        """The last call."""


class BlockShipment:
    """The agent's Source for one hand-off of a job, which may have several, one after another."""

    def __init__(self, context: WorkerContext, job: Job, handoff: Handoff, owner: ShipmentOwner) -> None:
        self.job = job
        self.began = context.clock()
        self.is_closed = False
        self.pack_s = 0.0  # since the first token was told
        self._told_at = self.began
        self._granted_at = self.began
        self._context = context
        self._owner = owner
        self._computed = Computed()
        shipment = Shipment(handoff.transfer_id, handoff.token, job.spec.num_tokens, context.layout, job.traceparent)
        self.sender: Sender = context.agent.offer(shipment, handoff.peer, self)

    def advance(self, computed: Computed) -> None:
        """More of the prompt is there."""
        self._computed = computed
        self.sender.computed(computed.num_tokens)
        if computed.firsts:
            self.sender.finish(computed.firsts)

    def first_token_told(self) -> None:
        """What comes from now on keeps the second token waiting."""
        self.pack_s, self._told_at = 0.0, self._context.clock()

    @property
    def grant_s(self) -> float:
        """Waited for room at the receiver after the first token was told."""
        return max(0.0, self._granted_at - self._told_at)

    def withdraw(self, reason: str) -> None:
        """The transfer is not needed any more. `on_closed` is called before this returns, unless it was before."""
        self.sender.abort(reason)

    # -- Source

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        layout, spec = self._context.layout, self.job.spec
        num_tokens = min(spec.num_tokens - first_block * layout.block_size, num_blocks * layout.block_size)
        ids = self._computed.block_ids[first_block : first_block + num_blocks]
        pool = self._context.host.engine.runner.pool
        began = self._context.clock()
        with on_handoff_stream(pool.raw.device):
            sums = pack(pool, ids, num_tokens, dtype, slot_tensor(payload), digest=digest)
        self.pack_s += self._context.clock() - began
        return sums

    def granted(self) -> None:
        self._granted_at = self._context.clock()
        self._owner.on_granted(self)

    def closed(self, outcome: Outcome, reason: str) -> None:
        self.is_closed = True
        self._owner.on_closed(self, outcome, reason)
