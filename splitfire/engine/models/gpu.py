"""The transformer of transformer.py in Triton kernels and cuBLAS. Engine thread only.

What the host knows of a step is its shape; everything else is read from the device, so that a CUDA graph of a shape computes every step
that fits it. Sequences with few new tokens (those that decode, also with drafts) share a launch of `attend_decode`; chunks of prompts
share one of `attend_prefill`. How they are cut up is worked out once a step for each window that layers have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_prefill import attend_prefill, prefill_tile_tokens
from splitfire.engine.kernels.gpu.attend_shared import Shared, attend_shared
from splitfire.engine.kernels.gpu.linear import linear
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.prepare import FEW_ROWS, Prepared, SharedPlaces, prepare, words_of
from splitfire.engine.kernels.gpu.rope_norm_write import rope_norm_write
from splitfire.engine.kernels.gpu.row_states import RowStates
from splitfire.engine.kernels.gpu.spans import Cut, Spans, cut
from splitfire.engine.kernels.linear import embed
from splitfire.engine.kernels.rope import Rotation
from splitfire.engine.logits import Logits
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.parallel.group import ALONE, Group
from splitfire.engine.pool import KvPool


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step as far as launches depend on it."""

    num_rows: int
    capacity: int  # places for sequences
    most_few: int  # new tokens of the longest of those with few; 0: there are none
    num_tiles: int  # of `attend_prefill`, at least; 0: every sequence has few
    num_groups: int = 0  # places for prefixes that sequences share; 0: nothing is looked at

    @staticmethod
    def of(batch: StepBatch, prefill_tokens: int) -> StepShape:
        """prefill_tokens: of a tile."""
        counts = np.diff(batch.query_begins)
        few, many = counts[counts <= FEW_ROWS], counts[counts > FEW_ROWS]
        tiles = -(-many // prefill_tokens)
        return StepShape(len(batch.token_ids), len(counts), int(few.max(initial=0)), int(tiles.sum()))


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward step, on the device."""

    prepared: Prepared
    shape: StepShape
    rotation: Rotation
    tiles: DecodeShape
    partials: Partials
    few_cuts: Mapping[int | None, Cut]  # by window; that of layers without one begins behind what is shared
    many_cuts: Mapping[int | None, Cut]
    shared: Shared | None


class GpuTransformer:
    """Transformer's weights and results."""

    def __init__(
        self, config: ModelConfig, weights: Weights, rope: RopeTable, num_multiprocessors: int, group: Group = ALONE
    ) -> None:
        """Of a rank: config and weights of its shard."""
        self.config = config
        self.group = group
        self.weights = weights
        self.rope = rope
        self.num_multiprocessors = num_multiprocessors

    def shape_of(self, batch: StepBatch, pool: KvPool) -> StepShape:
        return StepShape.of(batch, prefill_tile_tokens(self._group, pool.layer(0)))

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pool; logits of those that are asked for."""
        shape, count = self.shape_of(batch, pool), len(batch.lanes)
        num_blocks = pool.layout.blocks_for(int(batch.context_lens.max()))
        tables = _to(pool.device, np.ascontiguousarray(batch.block_tables[batch.lanes, :num_blocks]))
        words = _to(pool.device, words_of(replace(batch, lanes=np.arange(count)), count, shape.num_rows))
        prepared = prepare(words, None, tables, None, count, shape.num_rows, pool.layout.block_size)
        hidden, update = self.forward(prepared, shape, pool)
        rows = _to(pool.device, batch.logit_rows)
        return Logits.of(self.logits(hidden[rows], update[rows]).float())

    def forward(
        self, prepared: Prepared, shape: StepShape, pool: KvPool, shared: SharedPlaces | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> [num_rows, hidden] twice: what their sum is, is the residual stream before the final norm. shared: where the shape has
        groups."""
        config, eps = self.config, self.config.rms_norm_eps
        step = self._step(prepared, shape, pool, shared)
        hidden = embed(prepared.token_ids, self.weights.embed, self.weights.final_norm.dtype)
        update: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            normed = add_rms_norm(hidden, update, layer.input_norm, eps)
            mixed = self._attention(index, normed, layer, step, pool)
            mixed = mixed.view(-1, config.num_heads * config.head_dim)
            update = self.group.all_reduce(linear(mixed, layer.out, layer.out_bias))
            normed = add_rms_norm(hidden, update, layer.post_norm, eps)
            gated = silu_mul(linear(normed, layer.gate_up, layer.gate_up_bias))
            update = self.group.all_reduce(linear(gated, layer.down, layer.down_bias))
        assert update is not None
        return hidden, update

    def logits(self, hidden: Tensor, update: Tensor) -> Tensor:
        """What `forward` returned, some of its rows -> [rows, vocab], on rank 0."""
        normed = add_rms_norm(hidden, update, self.weights.final_norm, self.config.rms_norm_eps)
        return self.group.gather_columns(linear(normed, self.weights.lm_head), self.config.vocab_size)

    @property
    def _group(self) -> int:
        return self.config.num_heads // self.config.num_kv_heads

    def _step(self, prepared: Prepared, shape: StepShape, pool: KvPool, shared: SharedPlaces | None) -> _Step:
        tiles = decode_shape(self._group, max(1, shape.most_few), self.num_multiprocessors)
        few = self._cuts(prepared.few, tiles.tile_tokens(self._group)) if shape.most_few else {}
        if shared is not None:
            few[None] = cut(prepared.few, tiles.tile_tokens(self._group), self.config.num_kv_heads, None, shared.starts)
        many = self._cuts(prepared.many, prefill_tile_tokens(self._group, pool.layer(0))) if shape.num_tiles else {}
        partials = Partials.of(tiles, self.config.head_dim, pool.device)
        groups = None if shared is None else self._shared(shared.groups, shape, pool)
        return _Step(prepared, shape, self.rope.rotation(prepared.positions), tiles, partials, few, many, groups)

    def _shared(self, groups: Spans, shape: StepShape, pool: KvPool) -> Shared:
        config = self.config
        tiles = decode_shape(self._group, shape.num_rows, self.num_multiprocessors)
        states = RowStates.of(shape.num_rows, config.num_heads, config.head_dim, pool.device)
        how = cut(groups, tiles.tile_tokens(self._group), config.num_kv_heads, None)
        return Shared(groups, how, tiles, Partials.of(tiles, config.head_dim, pool.device), states)

    def _attention(self, index: int, normed: Tensor, layer: LayerWeights, step: _Step, pool: KvPool) -> Tensor:
        config, cache, prepared = self.config, pool.layer(index), step.prepared
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(normed.shape[0], -1, config.head_dim)
        q = rope_norm_write(qkv, step.rotation, layer.qk_norm, cache, prepared.targets)
        # Rows that nobody has are not written by attention, and what is not a number in them would stay theirs alone.
        mixed = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        window, scale = config.windows[index], config.head_dim**-0.5
        if step.shape.most_few:
            shared = step.shared if window is None else None
            if shared is not None:
                attend_shared(q, cache, shared, scale)
            states = None if shared is None else shared.states
            attend_decode(q, cache, prepared.few, step.few_cuts[window], step.tiles, step.partials, scale, window, mixed, states)
        if step.shape.num_tiles:
            attend_prefill(q, cache, prepared.many, step.many_cuts[window], step.shape.num_tiles, scale, window, mixed)
        return mixed

    def _cuts(self, spans: Spans, tile_tokens: int) -> dict[int | None, Cut]:
        return {window: cut(spans, tile_tokens, self.config.num_kv_heads, window) for window in set(self.config.windows)}


def _to(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device)
