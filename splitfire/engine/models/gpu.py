"""The transformer of transformer.py in Triton kernels and cuBLAS. Engine thread only.

Sequences with few new tokens (those that decode, also with drafts) share a launch of `attend_decode`; chunks of prompts share one of
`attend_prefill`. How they are cut up is worked out once a step for each window that layers have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_prefill import attend_prefill, prefill_tile_tokens
from splitfire.engine.kernels.gpu.linear import linear
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.rope_norm_write import rope_norm_write
from splitfire.engine.kernels.gpu.spans import Cut, Spans, cut
from splitfire.engine.kernels.linear import embed
from splitfire.engine.kernels.rope import CacheTargets, Rotation
from splitfire.engine.logits import Logits
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.pool import KvPool

FEW_ROWS = 128  # new tokens of a sequence that `attend_decode` takes


@dataclass(frozen=True, slots=True)
class FewRows:
    """Sequences for `attend_decode`."""

    spans: Spans
    shape: DecodeShape
    partials: Partials
    cuts: Mapping[int | None, Cut]  # by window


@dataclass(frozen=True, slots=True)
class ManyRows:
    """Sequences for `attend_prefill`."""

    spans: Spans
    num_tiles: int
    cuts: Mapping[int | None, Cut]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One forward step, on the device."""

    token_ids: Tensor  # [num_tokens] int64
    rotation: Rotation
    targets: CacheTargets
    few: FewRows | None
    many: ManyRows | None


class GpuTransformer:
    """Transformer's weights and results; no step waits for the device before its logits are there."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: RopeTable, num_multiprocessors: int) -> None:
        self.config = config
        self.weights = weights
        self.rope = rope
        self._num_multiprocessors = num_multiprocessors

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pool; logits of those that are asked for."""
        hidden, update = self.forward(self.step_input(batch, pool), pool)
        rows = torch.from_numpy(batch.logit_rows).to(hidden.device, non_blocking=True)
        normed = add_rms_norm(hidden[rows], update[rows], self.weights.final_norm, self.config.rms_norm_eps)
        return Logits.of(linear(normed, self.weights.lm_head).float())

    def step_input(self, batch: StepBatch, pool: KvPool) -> StepInput:
        """The tensors of a batch, on the pool's device."""
        device, size = pool.device, pool.layout.block_size
        counts = np.diff(batch.query_begins)
        blocks, offsets = np.divmod(batch.positions, size)
        blocks = batch.block_tables[np.repeat(batch.lanes, counts), blocks]
        positions = _to(device, batch.positions)
        targets = CacheTargets(_to(device, blocks.astype(np.int64)), _to(device, offsets))
        is_few = counts <= FEW_ROWS
        return StepInput(
            _to(device, batch.token_ids), self.rope.rotation(positions), targets,
            self._few(batch, np.flatnonzero(is_few), pool) if is_few.any() else None,
            self._many(batch, np.flatnonzero(~is_few), pool) if not is_few.all() else None,
        )  # fmt: skip

    def forward(self, step: StepInput, pool: KvPool) -> tuple[Tensor, Tensor]:
        """-> [num_tokens, hidden] twice: what their sum is, is the residual stream before the final norm."""
        config, eps = self.config, self.config.rms_norm_eps
        hidden = embed(step.token_ids, self.weights.embed, self.weights.final_norm.dtype)
        update: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            normed = add_rms_norm(hidden, update, layer.input_norm, eps)
            mixed = self._attention(index, normed, layer, step, pool)
            update = linear(mixed.view(-1, config.num_heads * config.head_dim), layer.out, layer.out_bias)
            normed = add_rms_norm(hidden, update, layer.post_norm, eps)
            update = linear(silu_mul(linear(normed, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
        assert update is not None
        return hidden, update

    def _attention(self, index: int, normed: Tensor, layer: LayerWeights, step: StepInput, pool: KvPool) -> Tensor:
        config, cache = self.config, pool.layer(index)
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(normed.shape[0], -1, config.head_dim)
        q = rope_norm_write(qkv, step.rotation, layer.qk_norm, cache, step.targets)
        mixed = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        window, scale = config.windows[index], config.head_dim**-0.5
        if step.few is not None:
            few = step.few
            attend_decode(q, cache, few.spans, few.cuts[window], few.shape, few.partials, scale, window, mixed)
        if step.many is not None:
            many = step.many
            attend_prefill(q, cache, many.spans, many.cuts[window], many.num_tiles, scale, window, mixed)
        return mixed

    def _few(self, batch: StepBatch, which: NDArray[np.int64], pool: KvPool) -> FewRows:
        config = self.config
        group = config.num_heads // config.num_kv_heads
        spans = _spans(batch, which, pool)
        most_rows = int((batch.query_begins[which + 1] - batch.query_begins[which]).max())
        shape = decode_shape(group, most_rows, self._num_multiprocessors)
        return FewRows(spans, shape, Partials.of(shape, config.head_dim, pool.device), self._cuts(spans, shape.tile_tokens(group)))

    def _many(self, batch: StepBatch, which: NDArray[np.int64], pool: KvPool) -> ManyRows:
        tile_tokens = prefill_tile_tokens(self.config.num_heads // self.config.num_kv_heads, pool.layer(0))
        spans = _spans(batch, which, pool)
        num_tiles = -(-(batch.query_begins[which + 1] - batch.query_begins[which]) // tile_tokens)
        return ManyRows(spans, int(num_tiles.sum()), self._cuts(spans, tile_tokens))

    def _cuts(self, spans: Spans, tile_tokens: int) -> Mapping[int | None, Cut]:
        return {window: cut(spans, tile_tokens, self.config.num_kv_heads, window) for window in set(self.config.windows)}


def _spans(batch: StepBatch, which: NDArray[np.int64], pool: KvPool) -> Spans:
    begins, ends, lanes = batch.query_begins[which], batch.query_begins[which + 1], np.arange(len(which))
    num_blocks = pool.layout.blocks_for(int(batch.context_lens[which].max()))
    tables = batch.block_tables[batch.lanes[which], :num_blocks]
    rest = (begins, ends, batch.context_lens[which], lanes, np.ascontiguousarray(tables))
    return Spans(*(_to(pool.device, array.astype(np.int32)) for array in rest))


def _to(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
