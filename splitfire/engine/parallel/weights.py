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
from splitfire.engine.parallel.matrices import columns, moved, rows, tensor_rows
from splitfire.engine.parallel.shards import gate_up_rows, kept_columns, kept_rows, qkv_rows, share


def load_shard(
    model: ModelDir, options: LoadOptions, rank: int, size: int, device: torch.device, progress: Progress | None = None
) -> Weights:
    """Read where `options` say, one matrix at a time: beside the shard there is never more than one whole matrix, and the embedding,
    which every rank has. Then moved to `device`."""
    config = model.config
    cutter = _Cutter(config, rank, size, device, options.dtype)
    read = load_weights(model, options, progress, cutter.part)
    head = read.lm_head
    if config.tie_word_embeddings:
        head = rows(read.embed, [share(config.vocab_size, rank, size)])
    layers = tuple(cutter.layer(layer) for layer in read.layers)
    return Weights(moved(read.embed, device), layers, read.final_norm.to(device), moved(head, device))


@dataclass(frozen=True, slots=True)
class _Cutter:
    """One rank's."""

    config: ModelConfig
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of computation

    def part(self, name: str, whole: Matrix) -> Matrix:
        """What the rank has of the matrix of this name."""
        place = (self.config, name, self.rank, self.size)
        if (kept := kept_rows(*place)) is not None:
            return rows(whole, [kept])
        if (kept := kept_columns(*place)) is not None:
            return columns(whole, kept, self.dtype)
        return whole

    def layer(self, layer: LayerWeights) -> LayerWeights:
        """On the rank's device, and with its part of the biases. Matrices are the rank's already."""
        place, norm = (self.config, self.rank, self.size), layer.qk_norm
        return LayerWeights(
            input_norm=layer.input_norm.to(self.device),
            qkv=moved(layer.qkv, self.device),
            qkv_bias=self._bias(layer.qkv_bias, qkv_rows(*place)),
            qk_norm=norm and QkNorm(norm.q_weight.to(self.device), norm.k_weight.to(self.device), norm.eps),
            out=moved(layer.out, self.device),
            out_bias=self._bias_of_sum(layer.out_bias),
            post_norm=layer.post_norm.to(self.device),
            gate_up=moved(layer.gate_up, self.device),
            gate_up_bias=self._bias(layer.gate_up_bias, gate_up_rows(*place)),
            down=moved(layer.down, self.device),
            down_bias=self._bias_of_sum(layer.down_bias),
        )

    def _bias(self, bias: Tensor | None, parts: tuple[range, ...]) -> Tensor | None:
        return None if bias is None else tensor_rows(bias, parts).to(self.device)

    def _bias_of_sum(self, bias: Tensor | None) -> Tensor | None:
        """What the ranks have is added up, so only one of them adds the bias."""
        return None if bias is None or self.rank else bias.to(self.device)
