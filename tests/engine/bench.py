"""A model computed step by step, without an engine: some sequences in one pool, in any chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitfire.core.layout import KvLayout
from splitfire.engine.batch import StepBatch
from splitfire.engine.logits import Logits
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model

BLOCK_SIZE, NUM_BLOCKS = 16, 40


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [begin, end) of a sequence, computed in one step."""

    sequence: int
    begin: int
    end: int


class Bench:
    """Some sequences in one pool, their blocks shuffled, computed piece by piece."""

    def __init__(self, model: Model, dtype: str, prompts: Sequence[Sequence[int]]) -> None:
        config = model.config
        self.model = model
        self.prompts = prompts
        layout = KvLayout(dtype, config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
        self.pool = KvPool(layout, NUM_BLOCKS, torch.device("cpu"))
        self.pool.raw.fill_(0xFF)  # NaN, or values out of place
        per_sequence = NUM_BLOCKS // len(prompts)
        ids = np.random.default_rng(1).permutation(NUM_BLOCKS)[: per_sequence * len(prompts)]
        self.tables = ids.reshape(len(prompts), per_sequence).astype(np.int32)

    def step(self, pieces: Sequence[Piece]) -> Logits:
        """Logits of every row."""
        tokens = [t for p in pieces for t in self.prompts[p.sequence][p.begin : p.end]]
        positions = [at for p in pieces for at in range(p.begin, p.end)]
        begins = np.cumsum([0, *(p.end - p.begin for p in pieces)])
        batch = StepBatch(
            np.array(tokens), np.array(positions), begins, np.array([p.end for p in pieces]),
            np.array([p.sequence for p in pieces]), self.tables, np.arange(len(tokens)), 0,
        )  # fmt: skip
        with torch.inference_mode():
            return self.model.compute(batch, self.pool)

    def kv(self, sequence: int) -> Tensor:
        """Bytes of the blocks that are full."""
        full = len(self.prompts[sequence]) // BLOCK_SIZE
        return self.pool.raw[self.tables[sequence, :full].astype(np.int64), : self.pool.layout.content_bytes]

    def whole(self) -> Tensor:
        """Every sequence in one step each; logits of all tokens, one after the other."""
        return torch.cat([self.step([Piece(i, 0, len(p))]).values for i, p in enumerate(self.prompts)])


def prompts_of(*lens: int, vocab: int = 4096) -> list[list[int]]:
    draw = np.random.default_rng(7)
    return [draw.integers(0, vocab, n).tolist() for n in lens]
