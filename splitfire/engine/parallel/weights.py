"""A rank's shard of a model's weights, cut from the whole as shards.py says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.kernels.linear import Matrix
from splitfire.engine.kernels.rope import QkNorm
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.parallel.matrices import columns, moved, release, rows, tensor_rows
from splitfire.engine.parallel.shards import down_columns, gate_up_rows, out_columns, qkv_rows, share


def cut_weights(whole: Weights, config: ModelConfig, rank: int, size: int, device: torch.device) -> Weights:
    """Takes the whole over: a layer is given back when it is cut, so that beside the whole there is never more than a layer's share, and
    in the end the shard. `config` is that of the whole."""
    cutter = _Cutter(config, rank, size, device, whole.final_norm.dtype)
    layers = []
    for layer in whole.layers:
        layers.append(cutter.layer(layer))
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            release(matrix)
    head = moved(rows(whole.lm_head, [share(config.vocab_size, rank, size)]), device)
    if whole.lm_head is not whole.embed:
        release(whole.lm_head)
    return Weights(moved(whole.embed, device), tuple(layers), whole.final_norm.to(device), head)


@dataclass(frozen=True, slots=True)
class _Cutter:
    """One rank's. Whatever it makes is on its device."""

    config: ModelConfig
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of computation

    def layer(self, layer: LayerWeights) -> LayerWeights:
        place = (self.config, self.rank, self.size)
        norm = layer.qk_norm
        return LayerWeights(
            input_norm=layer.input_norm.to(self.device),
            qkv=self._rows(layer.qkv, qkv_rows(*place)),
            qkv_bias=self._bias(layer.qkv_bias, qkv_rows(*place)),
            qk_norm=norm and QkNorm(norm.q_weight.to(self.device), norm.k_weight.to(self.device), norm.eps),
            out=self._columns(layer.out, out_columns(*place)),
            out_bias=self._bias_of_sum(layer.out_bias),
            post_norm=layer.post_norm.to(self.device),
            gate_up=self._rows(layer.gate_up, gate_up_rows(*place)),
            gate_up_bias=self._bias(layer.gate_up_bias, gate_up_rows(*place)),
            down=self._columns(layer.down, down_columns(*place)),
            down_bias=self._bias_of_sum(layer.down_bias),
        )

    def _rows(self, matrix: Matrix, parts: tuple[range, ...]) -> Matrix:
        return moved(rows(matrix, parts), self.device)

    def _columns(self, matrix: Matrix, part: range) -> Matrix:
        return moved(columns(matrix, part, self.dtype), self.device)

    def _bias(self, bias: Tensor | None, parts: tuple[range, ...]) -> Tensor | None:
        return None if bias is None else tensor_rows(bias, parts).to(self.device)

    def _bias_of_sum(self, bias: Tensor | None) -> Tensor | None:
        """What the ranks have is added up, so only one of them adds the bias."""
        return None if bias is None or self.rank else bias.to(self.device)
