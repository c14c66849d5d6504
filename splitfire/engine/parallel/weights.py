"""A rank's shard of a model's weights, cut as shards.py says while they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.core.model_dir import ModelDir
from splitfire.engine.checkpoint import LoadOptions, Progress, load_weights
from splitfire.engine.kernels.linear import Matrix
from splitfire.engine.kernels.rope import QkNorm
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.parallel.matrices import columns, moved, rows
from splitfire.engine.parallel.shards import kept_columns, kept_rows, share


def load_shard(
    model: ModelDir, options: LoadOptions, rank: int, size: int, device: torch.device, progress: Progress | None = None
) -> Weights:
    """Read where `options` say, one matrix at a time: beside the shard there is never more than one whole matrix, and the embedding,
    which every rank has. Then moved to `device`."""
    config = model.config
    read = load_weights(model, options, progress, _Cutter(config, rank, size, options.dtype))
    head = read.lm_head
    if config.tie_word_embeddings:
        head = rows(read.embed, [share(config.vocab_size, rank, size)])
    layers = tuple(_moved(layer, device) for layer in read.layers)
    return Weights(moved(read.embed, device), layers, read.final_norm.to(device), moved(head, device))


@dataclass(frozen=True, slots=True)
class _Cutter:
    """One rank's. Implements checkpoint.Cut."""

    config: ModelConfig
    rank: int
    size: int
    dtype: torch.dtype  # of computation

    def matrix(self, name: str, whole: Matrix) -> Matrix:
        place = (self.config, name, self.rank, self.size)
        if (kept := kept_rows(*place)) is not None:
            return rows(whole, [kept])
        if (kept := kept_columns(*place)) is not None:
            return columns(whole, kept, self.dtype)
        return whole

    def bias(self, name: str, whole: Tensor) -> Tensor | None:
        """Of products that the ranks add up only one of them adds it."""
        place = (self.config, name, self.rank, self.size)
        if (kept := kept_rows(*place)) is not None:
            return whole[kept.start : kept.stop].clone()
        return None if self.rank and kept_columns(*place) is not None else whole


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    norm = layer.qk_norm
    return LayerWeights(
        input_norm=layer.input_norm.to(device),
        qkv=moved(layer.qkv, device),
        qkv_bias=vector(layer.qkv_bias),
        qk_norm=norm and QkNorm(norm.q_weight.to(device), norm.k_weight.to(device), norm.eps),
        out=moved(layer.out, device),
        out_bias=vector(layer.out_bias),
        post_norm=layer.post_norm.to(device),
        gate_up=moved(layer.gate_up, device),
        gate_up_bias=vector(layer.gate_up_bias),
        down=moved(layer.down, device),
        down_bias=vector(layer.down_bias),
    )
