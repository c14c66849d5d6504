"""Runs a scheduled step: arrays to tensors, the model, and the draw. Engine thread only.

This is the seam between bookkeeping (blocks, scheduler) and arithmetic (models, kernels): a backend that takes a `StepBatch`
as it is, or prepares its inputs on the device, replaces this file and nothing above it.
"""

from __future__ import annotations

import numpy as np
import torch

from splitfire.engine.batch import StepBatch, batch_of
from splitfire.engine.drawing import StepTokens, draw
from splitfire.engine.kernels.attention import plan_batch
from splitfire.engine.kernels.rope import CacheTargets
from splitfire.engine.models.transformer import StepInput, Transformer
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Step


class Runner:
    """Owns the model and the pool's bytes."""

    def __init__(self, model: Transformer, pool: KvPool) -> None:
        self.model = model
        self.pool = pool

    def run(self, step: Step) -> StepTokens:
        """Computes the KV of every row, and a token, or several, for each sequence whose end the step reaches."""
        with torch.inference_mode():
            batch = batch_of(step)
            hidden = self.model.forward(self._inputs(batch), self.pool)
            if not len(batch.logit_rows):
                return StepTokens(batch.logit_rows, {}, {})
            if len(batch.logit_rows) < len(batch.token_ids):
                hidden = hidden[torch.from_numpy(batch.logit_rows).to(hidden.device)]
            return draw(self.model.logits(hidden), step)

    def _inputs(self, batch: StepBatch) -> StepInput:
        device, size = self.pool.device, self.pool.layout.block_size
        counts = np.diff(batch.query_begins)
        blocks, offsets = np.divmod(batch.positions, size)
        blocks = batch.block_tables[np.repeat(batch.lanes, counts), blocks].astype(np.int64)
        num_blocks = -(-batch.context_lens // size)
        tables = batch.block_tables[batch.lanes, : num_blocks.max()]
        attention = plan_batch(batch.query_begins, batch.context_lens, tables, num_blocks, device)
        targets = CacheTargets(torch.from_numpy(blocks).to(device), torch.from_numpy(offsets).to(device))
        token_ids, positions = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions)
        return StepInput(token_ids.to(device), positions.to(device), targets, attention)
