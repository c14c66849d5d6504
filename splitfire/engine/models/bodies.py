"""Which body a model gets: compiled where it runs, the torch reference elsewhere."""

from __future__ import annotations

import torch

from splitfire.core.model_config import ModelConfig
from splitfire.engine.kernels.linear import Int8Matrix
from splitfire.engine.models import compiled
from splitfire.engine.models.compiled import CompiledTransformer
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import Transformer, Weights


def is_compiled(config: ModelConfig, dtype: str, device: torch.device) -> bool:
    """Whether such a model can run compiled here; `dtype` is that of computation."""
    return device.type == "cpu" and dtype != "fp16" and compiled.fits(config)


def build(
    config: ModelConfig, weights: Weights, rope: RopeTable, dtype: str, *, may_compile: bool
) -> Transformer | CompiledTransformer:
    """`dtype` is that of computation. A compiled one has as many threads as torch, and takes the weights over."""
    matrix = weights.embed.elements if isinstance(weights.embed, Int8Matrix) else weights.embed
    if may_compile and is_compiled(config, dtype, matrix.device):
        return CompiledTransformer(config, weights, rope, torch.get_num_threads(), rounds=dtype == "bf16")
    return Transformer(config, weights, rope)
