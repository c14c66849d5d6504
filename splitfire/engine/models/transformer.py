"""One dense decoder-only transformer for every family: Llama, Mistral, Qwen2 and Qwen3 differ in its switches only.

Weights are tensors in the dtype of computation, matrices perhaps int8; q, k and v are one matrix, gate and up another. Rows of a step
are the new tokens of all its sequences, one after the other. Of several ranks each has a shard (parallel/), with a config of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.attention import AttentionStep, attend, plan_batch
from splitfire.engine.kernels.linear import Matrix, embed, linear
from splitfire.engine.kernels.norm import rms_norm, silu_mul
from splitfire.engine.kernels.rope import CacheTargets, QkNorm, Rotation, rope_norm_write
from splitfire.engine.logits import Logits
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.parallel.group import ALONE, Group
from splitfire.engine.pool import KvPool


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are [out, in]. A bias or norm that the family does not have is None."""

    input_norm: Tensor
    qkv: Matrix  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    qk_norm: QkNorm | None
    out: Matrix  # [hidden, num_heads * head_dim]
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Matrix  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Matrix  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model's tensors."""

    embed: Matrix  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Matrix  # [vocab, hidden]; the embedding itself when tied


@dataclass(frozen=True, slots=True)
class StepInput:
    """One forward step, on the model's device."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    targets: CacheTargets
    attention: AttentionStep


def step_input(batch: StepBatch, pool: KvPool) -> StepInput:
    """The tensors of a batch, on the pool's device."""
    device, size = pool.device, pool.layout.block_size
    counts = np.diff(batch.query_begins)
    blocks, offsets = np.divmod(batch.positions, size)
    blocks = batch.block_tables[np.repeat(batch.lanes, counts), blocks].astype(np.int64)
    num_blocks = -(-batch.context_lens // size)
    tables = batch.block_tables[batch.lanes, : num_blocks.max()]
    attention = plan_batch(batch.query_begins, batch.context_lens, tables, num_blocks, device)
    targets = CacheTargets(torch.from_numpy(blocks).to(device), torch.from_numpy(offsets).to(device))
    token_ids, positions = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions)
    return StepInput(token_ids.to(device), positions.to(device), targets, attention)


class Transformer:
    """The reference, in torch, on any device. Engine thread only."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: RopeTable, group: Group = ALONE) -> None:
        self.config = config
        self.weights = weights
        self.rope = rope
        self.group = group

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pool; logits of those that are asked for."""
        hidden = self.forward(step_input(batch, pool), pool)
        if len(batch.logit_rows) < len(batch.token_ids):
            hidden = hidden[torch.from_numpy(batch.logit_rows).to(hidden.device)]
        return Logits.of(self.logits(hidden))

    def forward(self, step: StepInput, pool: KvPool) -> Tensor:
        """-> [num_tokens, hidden], before the final norm."""
        hidden = embed(step.token_ids, self.weights.embed, self.weights.final_norm.dtype)
        rotation = self.rope.rotation(step.positions)
        for index, layer in enumerate(self.weights.layers):
            normed = rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps)
            hidden = hidden + self._attention(index, normed, layer, rotation, step, pool)
            normed = rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps)
            gated = silu_mul(linear(normed, layer.gate_up, layer.gate_up_bias))
            hidden = hidden + self.group.all_reduce(linear(gated, layer.down, layer.down_bias))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab], fp32, on rank 0."""
        normed = rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps)
        return self.group.gather_columns(linear(normed, self.weights.lm_head), self.config.vocab_size).float()

    def _attention(
        self, index: int, normed: Tensor, layer: LayerWeights, rotation: Rotation, step: StepInput, pool: KvPool
    ) -> Tensor:
        config = self.config
        num_tokens = normed.shape[0]
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(num_tokens, -1, config.head_dim)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        cache = pool.layer(index)
        q = rope_norm_write(q, k, v, rotation, layer.qk_norm, cache, step.targets)
        mixed = attend(q, cache, step.attention, config.head_dim**-0.5, config.windows[index])
        return self.group.all_reduce(linear(mixed.view(num_tokens, -1), layer.out, layer.out_bias))
