"""What every rank of a worker builds: its shard of one model, with its part of one KV pool. Decided by rank 0."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig
from splitfire.core.model_dir import ModelDir
from splitfire.engine.checkpoint import LoadOptions, Progress
from splitfire.engine.models.bodies import build
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import Weights
from splitfire.engine.parallel.group import Group
from splitfire.engine.parallel.shards import shard_config, shard_layout
from splitfire.engine.parallel.weights import load_shard
from splitfire.engine.pool import TORCH_DTYPES
from splitfire.engine.runner import Model


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The same on all ranks; as JSON it is the first thing that a follower is sent."""

    model: str  # the model's directory
    size: int  # ranks
    device: str  # cpu, or cuda: a GPU for each rank, in their order
    held: str  # dtype of weights
    dtype: str  # of computation
    is_int8: bool
    keeps_stored: bool
    allow_nonfinite: bool
    may_compile: bool
    max_context: int
    layout: KvLayout  # of the whole
    num_blocks: int
    num_threads: int  # of each rank

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes | bytearray) -> RankPlan:
        values = json.loads(text)
        return cls(**{**values, "layout": KvLayout(**values["layout"])})

    @property
    def rank_layout(self) -> KvLayout:
        return shard_layout(self.layout, self.size)

    @property
    def load_options(self) -> LoadOptions:
        """Weights are read in host memory and cut there: a GPU never holds more than its shard."""
        return LoadOptions(TORCH_DTYPES[self.held], torch.device("cpu"), self.allow_nonfinite, self.is_int8, self.keeps_stored)

    def device_of(self, rank: int) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device(self.device, rank)

    def load(self, model: ModelDir, rank: int, progress: Progress | None = None) -> Weights:
        """The rank's shard, on its device."""
        return load_shard(model, self.load_options, rank, self.size, self.device_of(rank), progress)

    def build(self, shard: Weights, config: ModelConfig, group: Group) -> Model:
        """config: the whole model's."""
        rope = rope_table(config.rope, config.head_dim, self.max_context, self.device_of(group.rank))
        return build(shard_config(config, self.size), shard, rope, self.dtype, may_compile=self.may_compile, group=group)
