"""The transformer of transformer.py as one compiled call a step, on CPUs that native/step.cpp runs on. Engine thread only.

Weights are packed once, when it is built; activations are fp32 whatever the weights are. A row's results are the same bits in
any batch, chunk and number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitfire.core.model_config import ModelConfig
from splitfire.engine.kernels.native import step as native
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.pool import KvPool


class CompiledTransformer:
    """Owns the packed weights and the threads."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: RopeTable, num_threads: int) -> None:
        assert runs(config, weights)
        self.config = config
        self._kept: list[Tensor] = []  # what the structures point to
        self._engine = native.StepEngine(num_threads)
        self._layers = (native.Layer * config.num_layers)(
            *(self._layer(layer, window) for layer, window in zip(weights.layers, config.windows, strict=True))
        )
        is_tied = weights.lm_head is weights.embed
        self._model = native.Model(
            config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size, config.rms_norm_eps, rope.attention_factor,
            self._layers, self._floats(rope.inverse_frequencies), self._floats(weights.final_norm), self._matrix(weights.lm_head, None),
            None if is_tied else self._keep(weights.embed.contiguous()), None,
        )  # fmt: skip

    def step(
        self,
        token_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        spans: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        pool: KvPool,
    ) -> tuple[Tensor, list[int]]:
        logits = torch.empty(len(rows), self.config.vocab_size)
        best = np.empty(len(rows), np.int64)
        self._engine.run(
            self._model, native.pool_of(pool.raw, pool.layout),
            native.Step(
                len(token_ids), len(spans), len(rows), token_ids.ctypes.data, positions.ctypes.data, spans.ctypes.data,
                tables.ctypes.data, rows.ctypes.data, logits.data_ptr(), best.ctypes.data,
            ),
        )  # fmt: skip
        return logits, best.tolist()

    # -- packing

    def _layer(self, layer: LayerWeights, window: int | None) -> native.Layer:
        norm = layer.qk_norm
        return native.Layer(
            self._floats(layer.input_norm), self._matrix(layer.qkv, layer.qkv_bias),
            None if norm is None else self._floats(norm.q_weight), None if norm is None else self._floats(norm.k_weight),
            self._matrix(layer.out, layer.out_bias), self._floats(layer.post_norm),
            self._matrix(interleave(layer.gate_up), layer.gate_up_bias), self._matrix(layer.down, layer.down_bias),
            native.NO_WINDOW if window is None else window,
        )  # fmt: skip

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> native.Matrix:
        return native.Matrix(
            self._keep(native.pack_panels(weight)), None, None if bias is None else self._floats(bias),
            weight.shape[0], weight.shape[1], native.WEIGHTS.index(weight.dtype),
        )  # fmt: skip

    def _floats(self, x: Tensor) -> int:
        return self._keep(x.float().contiguous())

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()


def interleave(gate_up: Tensor) -> Tensor:
    """[2 * intermediate, hidden], gate's rows first -> the panels of both in turn, each filled up to whole ones."""
    halves = gate_up.chunk(2)
    missing = -len(halves[0]) % native.PANEL
    padded = [torch.cat((h, h.new_zeros(missing, h.shape[1]))) if missing else h for h in halves]
    return torch.stack([p.view(-1, native.PANEL, p.shape[1]) for p in padded], 1).view(-1, gate_up.shape[1])


def runs(config: ModelConfig, weights: Weights) -> bool:
    """Whether this model, in the dtype of its weights, can be run here."""
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    return (
        native.is_available()
        and all(width % native.LANES == 0 for width in widths)
        and config.head_dim <= native.MAX_HEAD_DIM
        and config.num_heads // config.num_kv_heads <= native.MAX_GROUP
        and weights.embed.device.type == "cpu"
        and weights.embed.dtype in native.WEIGHTS
    )
