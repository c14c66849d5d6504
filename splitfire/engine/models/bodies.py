"""Which body a model gets: compiled on a CPU and in Triton on a GPU where they run, the torch reference elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal

import torch

from splitfire.core.model_config import ModelConfig
from splitfire.engine.models import compiled
from splitfire.engine.models.compiled import CompiledTransformer
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import Transformer, Weights
from splitfire.engine.runner import Model

Body = Literal["compiled", "triton", "torch"]


def is_compiled(config: ModelConfig, dtype: str, device: torch.device) -> bool:
    """Whether such a model can run compiled here; `dtype` is that of computation."""
    return device.type == "cpu" and dtype != "fp16" and compiled.fits(config)


def body_for(config: ModelConfig, dtype: str, device: torch.device, *, may_compile: bool) -> Body:
    """`dtype` is that of computation."""
    if may_compile and is_compiled(config, dtype, device):
        return "compiled"
    if may_compile and device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "torch"


def build(config: ModelConfig, weights: Weights, rope: RopeTable, dtype: str, *, may_compile: bool) -> Model:
    """`dtype` is that of computation. A compiled one has as many threads as torch, and takes the weights over."""
    device = weights.final_norm.device
    body = body_for(config, dtype, device, may_compile=may_compile)
    if body == "compiled":
        return CompiledTransformer(config, weights, rope, torch.get_num_threads(), rounds=dtype == "bf16")
    if body == "triton":
        gpu = importlib.import_module("splitfire.engine.models.gpu")  # which imports triton: not everybody has it
        model: Model = gpu.GpuTransformer(config, weights, rope, torch.cuda.get_device_properties(device).multi_processor_count)
        return model
    return Transformer(config, weights, rope)
