"""Which body a model gets, and which runner: compiled on a CPU, in Triton on a GPU where they run, the torch reference elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Literal

import torch

from splitfire.core.model_config import ModelConfig
from splitfire.engine.models import compiled
from splitfire.engine.models.compiled import CompiledTransformer
from splitfire.engine.models.rope import RopeTable
from splitfire.engine.models.transformer import Transformer, Weights
from splitfire.engine.parallel.group import ALONE, Group
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model, Runner, StepRunner

Body = Literal["compiled", "triton", "torch"]


def is_compiled(config: ModelConfig, dtype: str, device: torch.device) -> bool:
    """Whether such a model can run compiled here; `dtype` is that of computation."""
    return device.type == "cpu" and dtype != "fp16" and compiled.fits(config)


def body_for(config: ModelConfig, dtype: str, device: torch.device, *, may_compile: bool, num_ranks: int = 1) -> Body:
    """`dtype` is that of computation. The compiled one cannot add up what several ranks have."""
    if may_compile and num_ranks == 1 and is_compiled(config, dtype, device):
        return "compiled"
    if may_compile and device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "torch"


def build(config: ModelConfig, weights: Weights, rope: RopeTable, dtype: str, *, may_compile: bool, group: Group = ALONE) -> Model:
    """`dtype` is that of computation. A compiled one has as many threads as torch, and takes the weights over. Of a rank: config and
    weights of its shard."""
    device = weights.final_norm.device
    body = body_for(config, dtype, device, may_compile=may_compile, num_ranks=group.size)
    if body == "compiled":
        return CompiledTransformer(config, weights, rope, torch.get_num_threads(), rounds=dtype == "bf16")
    if body == "triton":
        gpu = importlib.import_module("splitfire.engine.models.gpu")  # which imports triton: not everybody has it
        num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        model: Model = gpu.GpuTransformer(config, weights, rope, num_multiprocessors, group)
        return model
    return Transformer(config, weights, rope, group)


def make_runner(
    model: Model, pool: KvPool, num_lanes: int, max_context: int, on_progress: Callable[[int, int], None]
) -> StepRunner:
    """For a model of `build` that is alone. On a GPU steps are recorded now; on_progress: recorded, of all."""
    if isinstance(model, (CompiledTransformer, Transformer)):
        return Runner(model, pool)
    runners = importlib.import_module("splitfire.engine.device.runner")
    graphs = importlib.import_module("splitfire.engine.device.graphs")
    runner = runners.DeviceRunner(model, pool, num_lanes, max_context)
    runner.record(graphs.CudaRecorder(pool.device), on_progress)
    runner.compile_others()
    made: StepRunner = runner
    return made
