"""Engines for tests: built like a worker builds them, driven by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockPool
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.drafting import Speculator
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.native import step as native
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.models.compiled import CompiledTransformer
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.pool import TORCH_DTYPES, KvPool
from splitfire.engine.runner import Model, Runner
from splitfire.engine.scheduler import Budget
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec
from splitfire.engine.updates import SequenceUpdate

GREEDY = SamplingParams(temperature=0.0)
ROOT_HASH = chain_root(b"", b"test", "")
_ids = itertools.count()


def load_model(path: Path, dtype: str = "fp32", context: int | None = None, is_int8: bool = False) -> Transformer:
    model = ModelDir(path)
    weights = load_weights(model, LoadOptions(TORCH_DTYPES[dtype], torch.device("cpu"), is_int8=is_int8))
    config = model.config
    return Transformer(
        config, weights, rope_table(config.rope, config.head_dim, context or config.max_positions, torch.device("cpu"))
    )


needs_compiled = pytest.mark.skipif(
    not native.is_available(), reason="no compiled step: no compiler, or a processor without AVX-512"
)


def load_compiled(
    path: Path, dtype: str = "fp32", *, num_threads: int = 2, is_int8: bool = False, rounds: bool = False
) -> CompiledTransformer:
    """The same model as one compiled call a step; it takes the weights over, so it loads them anew."""
    model = load_model(path, dtype, is_int8=is_int8)
    return CompiledTransformer(model.config, model.weights, model.rope, num_threads, rounds=rounds)


def make_engine(
    model: Model,
    *,
    dtype: str = "fp32",
    block_size: int = 32,
    num_blocks: int = 128,
    chunk_tokens: int = 512,
    max_running: int = 16,
    speculator: Speculator | None = None,
    caches_prefixes: bool = True,
) -> Engine:
    layout = KvLayout(dtype, model.config.num_layers, model.config.num_kv_heads, model.config.head_dim, block_size)
    runner = Runner(model, KvPool(layout, num_blocks, torch.device("cpu")))
    blocks = BlockPool(num_blocks, caches_prefixes=caches_prefixes)
    return Engine(runner, blocks, Budget(chunk_tokens, max_running), lambda: 0.0, speculator)


def make_spec(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampling: SamplingParams = GREEDY,
    output: Sequence[int] = (),
    purpose: Purpose = Purpose.GENERATE,
    stop: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    block_size: int = 32,
    priority: int = 0,
    choice: int = 0,
) -> SequenceSpec:
    tokens = (*prompt, *output)
    return SequenceSpec(
        SeqId(next(_ids)), tuple(prompt), tuple(output), choice, sampling, StopParams(max_tokens, min_tokens, stop), purpose,
        ROOT_HASH, hash_blocks(ROOT_HASH, tokens, block_size), priority,
    )  # fmt: skip


def drain(engine: Engine, max_steps: int = 10_000) -> list[SequenceUpdate]:
    """Steps until nothing can run; every update in order. Conservation is checked at each step."""
    updates: list[SequenceUpdate] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return updates
        updates += engine.step().updates
        engine.blocks.check()
        engine._scheduler.lanes.check()
    raise AssertionError(f"still working after {max_steps} steps")


def answers_of(engine: Engine, specs: Sequence[SequenceSpec]) -> dict[SeqId, list[int]]:
    """The tokens of each, all asked for at once; nothing is left behind."""
    for spec in specs:
        engine.add(spec)
    updates = drain(engine)
    assert_no_leaks(engine)
    return {spec.seq_id: tokens_of(updates, spec) for spec in specs}


def tokens_of(updates: Sequence[SequenceUpdate], spec: SequenceSpec) -> list[int]:
    return [token.token_id for token in sampled_of(updates, spec)]


def sampled_of(updates: Sequence[SequenceUpdate], spec: SequenceSpec) -> list[SampledToken]:
    """Every token of one sequence; offsets without a gap or a repeat (P2)."""
    sampled: list[SampledToken] = []
    for update in updates:
        if update.seq_id == spec.seq_id and update.tokens:
            assert update.offset == len(spec.output) + len(sampled)
            sampled += update.tokens
    return sampled


def assert_no_leaks(engine: Engine) -> None:
    """After everything ended: no block is used, none is lost (P4)."""
    engine.blocks.check()
    load = engine.load()
    assert load.available_blocks == load.total_blocks, load
    assert load.running == load.waiting == 0, load
