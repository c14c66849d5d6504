"""One shipment: the blocks of one held prompt on their way to a decode worker. io thread.

Reads pool blocks while the engine thread computes others: a block is packed only when every token in it is computed, and
nobody writes to it again before the sequence is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvtransfer.sender import Outcome, Sender, Shipment
from splitfire.engine.engine import SequenceUpdate
from splitfire.engine.kernels.pack import block_sums, pack
from splitfire.v1 import kv_pb2
from splitfire.worker.context import WorkerContext
from splitfire.worker.job import Handoff, Job, logprobs_to_wire


class BlockShipment:
    """The agent's Source for one job. Ends with exactly one call of `on_closed`."""

    def __init__(
        self, context: WorkerContext, job: Job, handoff: Handoff, on_closed: Callable[[BlockShipment, Outcome, str], None]
    ) -> None:
        self.job = job
        self.began = context.clock()
        self._context = context
        self._on_closed = on_closed
        self._block_ids: Sequence[int] = ()
        shipment = Shipment(handoff.transfer_id, handoff.token, job.spec.num_tokens, context.layout, job.traceparent)
        self.sender: Sender = context.agent.offer(shipment, handoff.peer, self)

    def advance(self, update: SequenceUpdate) -> None:
        """A chunk was computed; with the first token the prompt is complete."""
        self._block_ids = update.block_ids
        self.sender.computed(update.num_computed)
        if update.token is not None:
            first = kv_pb2.FirstToken(
                choice=self.job.spec.choice,
                offset=update.offset,
                token_id=update.token.token_id,
                logprobs=logprobs_to_wire(update.token),
            )
            self.sender.finish([first])

    def withdraw(self, reason: str) -> None:
        """The transfer is not needed any more. `on_closed` is called before this returns, unless it was before."""
        self.sender.abort(reason)

    # -- Source

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview) -> list[int]:
        layout, spec = self._context.layout, self.job.spec
        num_tokens = min(spec.num_tokens - first_block * layout.block_size, num_blocks * layout.block_size)
        buffer = torch.frombuffer(payload, dtype=torch.uint8)
        ids = self._block_ids[first_block : first_block + num_blocks]
        pack(self._context.host.engine.runner.pool, ids, num_tokens, dtype, buffer)
        return block_sums(buffer, num_blocks)

    def closed(self, outcome: Outcome, reason: str) -> None:
        self._on_closed(self, outcome, reason)
