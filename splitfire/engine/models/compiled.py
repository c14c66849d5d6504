"""The transformer of transformer.py as one compiled call a step, on CPUs that native/step.cpp runs on. Engine thread only.

Activations are fp32 whatever the weights are; where the processor multiplies bf16 and that is the dtype of computation, products and
attention take them rounded. A row's results are the same bits in any batch, chunk and number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, Matrix
from splitfire.engine.kernels.native import step as native
from splitfire.engine.logits import Logits
from splitfire.engine.memory import Arena, line_bytes
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.pool import KvPool


class CompiledTransformer:
    """Takes the weights over: each matrix is given back when it is packed, so that beside them there is never more than one."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: RopeTable, num_threads: int, *, rounds: bool) -> None:
        """rounds: activations are rounded to bf16 for products and attention, where the processor multiplies bf16 and no matrix is fp32."""
        assert fits(config)
        self.config = config
        self._rounds = (
            rounds and native.has_bf16_units() and all(_elements(matrix).dtype in native.DOTS for matrix, _ in _matrices(weights))
        )
        self._kept: list[Tensor] = []  # what the structures point to
        self._arena = Arena(sum(_packed_bytes(m, 1 + is_pair) for m, is_pair in _matrices(weights)))
        self._engine = native.StepEngine(num_threads)
        self._layers = (native.Layer * config.num_layers)(
            *(self._layer(layer, window) for layer, window in zip(weights.layers, config.windows, strict=True))
        )
        embed, scales = (None, None) if weights.lm_head is weights.embed else self._rows(weights.embed)
        self._model = native.Model(
            config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size, config.rms_norm_eps, rope.attention_factor,
            self._layers, self._floats(rope.inverse_frequencies), self._floats(weights.final_norm), self._matrix(weights.lm_head),
            embed, scales, self._rounds,
        )  # fmt: skip

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pool; logits of those that are asked for."""
        num_rows = len(batch.logit_rows)
        values, best = torch.empty(num_rows, self.config.vocab_size), np.empty(num_rows, np.int64)
        arrays = (batch.token_ids, batch.positions, batch.query_begins, batch.context_lens, batch.lanes, batch.block_tables)
        assert all(array.flags.c_contiguous for array in (*arrays, batch.logit_rows))
        step = native.Step(
            len(batch.token_ids), len(batch.context_lens), num_rows, *(array.ctypes.data for array in arrays),
            batch.block_tables.shape[1], batch.logit_rows.ctypes.data, values.data_ptr(), best.ctypes.data,
        )  # fmt: skip
        self._engine.run(self._model, native.pool_of(pool.raw, pool.layout), step)
        return Logits(values, best, native.draw)

    # -- packing

    def _layer(self, layer: LayerWeights, window: int | None) -> native.Layer:
        norm = layer.qk_norm
        return native.Layer(
            self._floats(layer.input_norm), self._matrix(layer.qkv, layer.qkv_bias),
            None if norm is None else self._floats(norm.q_weight), None if norm is None else self._floats(norm.k_weight),
            self._matrix(layer.out, layer.out_bias), self._floats(layer.post_norm),
            self._matrix(layer.gate_up, layer.gate_up_bias, num_parts=2), self._matrix(layer.down, layer.down_bias),
            native.NO_WINDOW if window is None else window,
        )  # fmt: skip

    def _matrix(self, matrix: Matrix, bias: Tensor | None = None, num_parts: int = 1) -> native.Matrix:
        """Of several parts, one below the other and equally high, panels come in turn."""
        assert not isinstance(matrix, GroupedMatrix)
        elements, scales = (matrix.elements, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix, None)
        whole = native.interleave_panels(elements, num_parts)
        if num_parts > 1 and scales is not None:
            scales = native.interleave_panels(scales[:, None], num_parts)[:, 0]
        twin = native.Matrix(
            self._keep(self._arena.take(native.pack_panels(whole))), None if scales is None else self._floats(scales),
            None if bias is None else self._floats(bias), *whole.shape,
            native.DOTS[whole.dtype] if self._rounds else native.WEIGHTS.index(whole.dtype),
        )  # fmt: skip
        elements.untyped_storage().resize_(0)
        return twin

    def _rows(self, matrix: Matrix) -> tuple[int, int | None]:
        if isinstance(matrix, Int8Matrix):
            return self._keep(matrix.elements.contiguous()), self._floats(matrix.scales)
        assert isinstance(matrix, Tensor)
        return self._keep(matrix.contiguous()), None

    def _floats(self, x: Tensor) -> int:
        return self._keep(x.float().contiguous())

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()


def _matrices(weights: Weights) -> Iterator[tuple[Matrix, bool]]:
    """Those that are packed, and whether of two parts."""
    for layer in weights.layers:
        yield from ((layer.qkv, False), (layer.out, False), (layer.gate_up, True), (layer.down, False))
    yield weights.lm_head, False


def _elements(matrix: Matrix) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.elements


def _packed_bytes(matrix: Matrix, num_parts: int) -> int:
    elements = _elements(matrix)
    columns, inputs = elements.shape
    panels = num_parts * -(-columns // (num_parts * native.PANEL))
    return line_bytes(panels * native.PANEL * inputs * elements.element_size())


def fits(config: ModelConfig) -> bool:
    """Whether models of this shape run compiled on this machine, with weights in bf16, fp32 or int8."""
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    return (
        native.is_available()
        and all(width % native.LANES == 0 for width in widths)
        and config.head_dim <= native.MAX_HEAD_DIM
        and config.num_heads // config.num_kv_heads <= native.MAX_GROUP
    )
