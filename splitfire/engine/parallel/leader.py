"""Rank 0's model: what a worker of several ranks gives its engine. Engine thread only."""

from __future__ import annotations

import torch

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch
from splitfire.engine.logits import Logits
from splitfire.engine.parallel.followers import END_S, Followers, RankLost
from splitfire.engine.parallel.steps import encode
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model


class Leader:
    """A step goes to the followers first and is then computed here, with them. After a RankLost there is no going on."""

    def __init__(self, config: ModelConfig, shard: Model, followers: Followers) -> None:
        self.config = config  # the whole model's
        self._shard = shard
        self._followers = followers

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pools of all ranks; logits of the rows that are asked for."""
        self._followers.send(encode(batch, pool.layout.block_size))
        try:
            logits = self._shard.compute(batch, pool)
        except RuntimeError as exc:
            if lost := self._followers.lost(END_S):
                raise RankLost(lost) from exc
            raise
        if pool.device.type == "cuda":  # or the other ranks' pools would be read before the sums that say they are written
            torch.cuda.synchronize(pool.device)
        return logits
