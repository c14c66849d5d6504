"""Whole steps: beside the bytes they read, a torch.compile loop, more rows, and what the GPU waits for the host between them."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch

from benchmarks.gpu.opponents import compiled_step, sorted_draw
from benchmarks.gpu.shapes import LLAMA_1B, LLAMA_8B, QWEN_06B, body, random_pool, random_weights, shape_of, weight_bytes
from benchmarks.gpu.timing import Bench, Ceilings, Run, bound_row, floor_row, pair_row
from benchmarks.report import Row
from splitfire.core.hashing import chain_root
from splitfire.core.model_config import ModelConfig
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockPool
from splitfire.engine.device.graphs import CudaRecorder
from splitfire.engine.device.runner import DeviceRunner
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.gpu.draw_rows import LaneParameters, draw_rows
from splitfire.engine.kernels.gpu.sample import draw
from splitfire.engine.models.transformer import Weights
from splitfire.engine.scheduler import Budget
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec
from splitfire.engine.speculation.measure import make_step

CONTEXT, DRY_CONTEXT = 1024, 40
IN_A_ROW = 10  # steps


def runner_of(config: ModelConfig, weights: Weights, bench: Bench, num_lanes: int, context: int, num_tokens: int) -> DeviceRunner:
    runner = DeviceRunner(body(config, weights, bench), random_pool(config, bench, num_tokens), num_lanes, context + 256)
    if not bench.is_dry:
        runner.record(CudaRecorder(bench.device), lambda done, count: None)
    return runner


def step_run(runner: DeviceRunner, num_sequences: int, num_drafts: int, context: int) -> Run:
    """The step alone: launched, not waited for."""
    step = make_step(runner, num_sequences, num_drafts, context)
    return lambda: runner.launch(step)


def rows(bench: Bench, ceilings: Ceilings) -> list[Row]:
    context = DRY_CONTEXT if bench.is_dry else CONTEXT
    found: list[Row] = []
    for name, shape in (("Llama-3.2-1B", LLAMA_1B), ("Llama-3.1-8B", LLAMA_8B)):
        found += one_stream_rows(name, shape_of(shape, bench), bench, ceilings, context, is_target=shape is LLAMA_8B)
        if not bench.is_dry:
            torch.cuda.empty_cache()
    return [*found, *batch_rows(bench, context)]


def one_stream_rows(
    name: str, config: ModelConfig, bench: Bench, ceilings: Ceilings, context: int, *, is_target: bool
) -> list[Row]:
    """Batch 1: bf16 beside its floor and torch.compile, int8 weights beside bf16, 64 verified rows beside one."""
    weights = random_weights(config, bench)
    runner = runner_of(config, weights, bench, 2 if bench.is_dry else 64, context, context + 256)
    compiled = compiled_step(config, weights, bench, context)
    wide = 3 if bench.is_dry else 63
    ours, theirs, verified = bench.times(
        step_run(runner, 1, 0, context), compiled, step_run(runner, 1, wide, context), in_a_row=IN_A_ROW
    )
    num_bytes = weight_bytes(weights)
    del runner, compiled, weights
    packed = random_weights(config, bench, is_int8=True)
    runner = runner_of(config, packed, bench, 2, context, context + 256)
    [int8] = bench.times(step_run(runner, 1, 0, context), in_a_row=IN_A_ROW)
    case = f"decode step, {name}, one stream"
    return [
        floor_row(case, ours, num_bytes / ceilings.copy, "weights over copy bandwidth", 0.80 if is_target else None),
        pair_row(case, ours, theirs, "torch.compile", 1.1 if is_target else None),
        pair_row(f"{case}, int8 weights", int8, ours, "our bf16", 1.7 if is_target else None),
        floor_row(f"{case}, int8 weights", int8, weight_bytes(packed) / ceilings.copy, "weights over copy bandwidth"),
        bound_row(case, f"{wide + 1} verified rows beside one", "x", statistics.median(verified) / statistics.median(ours), 1.2),
    ]


def batch_rows(bench: Bench, context: int) -> list[Row]:
    """Qwen3-0.6B, 32 streams: what the GPU waits between steps, and what sampling takes of one."""
    config, streams = shape_of(QWEN_06B, bench), 2 if bench.is_dry else 32
    weights = random_weights(config, bench)
    runner = runner_of(config, weights, bench, streams, context, streams * (context + 128))
    [alone] = bench.times(step_run(runner, streams, 0, context), in_a_row=IN_A_ROW)
    wall = engine_step_s(runner, streams, context, 3 if bench.is_dry else 96)
    gpu_s = statistics.median(alone)
    logits = torch.randn(streams, config.vocab_size, device=bench.device) * 3
    lanes = LaneParameters.of(streams, bench.device)
    lanes.temperatures.fill_(0.8)
    lanes.top_p.fill_(0.9)
    lanes.min_p.fill_(-torch.inf)
    which, positions = torch.arange(streams, dtype=torch.int32, device=bench.device), torch.arange(streams, device=bench.device)
    ours, theirs = bench.times(
        bench.graph(lambda: draw(logits, draw_rows(lanes, which, positions), None, None, bench.num_multiprocessors)),
        lambda: sorted_draw(logits, 0.8, 0.9),
    )
    case = f"Qwen3-0.6B, {streams} streams"
    return [
        bound_row(case, "the GPU waits between steps", "%", max(0.0, 100 * (1 - gpu_s / wall)), 2.0),
        bound_row(case, "sampling, of a step", "%", 100 * statistics.median(ours) / gpu_s, 3.0),
        pair_row(f"{case}: sampling, top-p 0.9", ours, theirs, "torch sort"),
    ]


def engine_step_s(runner: DeviceRunner, streams: int, context: int, num_steps: int) -> float:
    """Seconds between one step's tokens and the next one's, of a real engine whose sequences all decode."""
    size = runner.pool.layout.block_size
    engine = Engine(runner, BlockPool(runner.pool.num_blocks, caches_prefixes=False), Budget(2048, streams), time.monotonic)
    generator = torch.Generator().manual_seed(2)
    for number in range(streams):
        prompt = torch.randint(0, runner.model.config.vocab_size, (context,), generator=generator).tolist()
        stopping = StopParams(min(120, num_steps + 8))
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=number)
        spec = SequenceSpec(SeqId(number), tuple(prompt), (), 0, params, stopping, Purpose.GENERATE, chain_root(b"", b"", ""))
        engine.add(spec)
    assert runner.pool.num_blocks * size >= streams * (context + num_steps)
    while len(engine._scheduler.lanes.decoding) < streams:
        engine.step()
    ends = []
    for _ in range(num_steps):
        engine.step()
        ends.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(ends))
