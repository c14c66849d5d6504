"""An engine as a worker loads it, without the worker: sequences join with their context already there, steps are timed.

A sequence that joins has blocks and a length; what its KV says does not change how long it is read. The pool is filled with
noise once, so that nothing is computed on zeros.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitfire.core.flags import parse_settings
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.settings import WorkerSettings
from splitfire.engine.pool import KvPool
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec
from splitfire.worker.loading import LoadedModel, load_model

GREEDY = SamplingParams(temperature=0.0)
HASH_ROOT = chain_root(b"", b"benchmark", "")
SPARE_TOKENS = 512  # that a sequence may grow by while it is measured
KV_SCALE = 0.02  # in a quantised pool: with elements of about 40 the noise is about one
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine to be: worker flags, and what rows call it."""

    name: str
    flags: tuple[str, ...]

    def missing_flag(self) -> str:
        """A flag that workers of this version do not have; empty when they have all."""
        known = {f"--{name.replace('_', '-')}" for name in WorkerSettings.model_fields}
        return next((flag for flag in self.flags if flag.split("=")[0] not in known), "")


class LoadedEngine:
    """One engine. Calls are made one at a time, from one thread."""

    def __init__(self, variant: Variant, model: str, cpus: Sequence[int], num_tokens: int) -> None:
        """`num_tokens`: what the pool has to hold."""
        self.variant = variant
        flags = [f"--model={model}", f"--cpus={','.join(map(str, cpus))}", *variant.flags]
        self.settings = parse_settings(WorkerSettings, flags, prog="python -m benchmarks.engine")
        memory = f"--kv-memory={_kv_bytes(self.settings, num_tokens)}"
        self.loaded: LoadedModel = load_model(parse_settings(WorkerSettings, [*flags, memory], prog="python -m benchmarks.engine"))
        self.engine = self.loaded.engine
        _fill_with_noise(self.engine.runner.pool)

    def decode(self, streams: int, context: int, num_steps: int) -> list[float]:
        """Seconds of each of `num_steps` steps, one token for each of `streams` sequences of about `context` tokens."""
        specs = [self._join(context - 1, seed) for seed in range(streams)]
        try:
            self.engine.step()  # what a first step sets up
            times = []
            for _ in range(num_steps):
                began = time.perf_counter()
                result = self.engine.step()
                times.append(time.perf_counter() - began)
                assert len(result.updates) == streams and not any(u.error for u in result.updates)
            return times
        finally:
            for spec in specs:
                self.engine.finish(spec.seq_id)

    def prefill(self, num_tokens: int, seed: int) -> float:
        """Seconds from a prompt's first chunk to its first token."""
        spec = self._spec(num_tokens, 1, seed)
        began = time.perf_counter()
        self.engine.add(spec)
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - began

    def _join(self, num_tokens: int, seed: int) -> SequenceSpec:
        spec = self._spec(num_tokens, SPARE_TOKENS, seed)
        reservation = self.engine.lending.reserve(spec)
        assert reservation is not None, f"{self.variant.name}: no room for {num_tokens} tokens"
        first = reservation.num_pinned
        self.engine.lending.commit(reservation, first, len(spec.block_hashes) - first, spec.block_hashes[first:])
        self.engine.join(reservation, {spec.seq_id: seed + 1})
        return spec

    def _spec(self, num_tokens: int, max_tokens: int, seed: int) -> SequenceSpec:
        draw = random.Random(f"{num_tokens} {seed}")
        prompt = tuple(draw.randrange(self.loaded.model.config.vocab_size) for _ in range(num_tokens))
        hashes = hash_blocks(HASH_ROOT, prompt, self.loaded.layout.block_size)
        return SequenceSpec(
            SeqId(next(_ids)), prompt, (), 0, GREEDY, StopParams(max_tokens), Purpose.GENERATE, HASH_ROOT, hashes
        )  # fmt: skip


def _kv_bytes(settings: WorkerSettings, num_tokens: int) -> int:
    """Enough for `num_tokens` and for one sequence of the model's context, which is the least a worker accepts."""
    config = ModelDir(resolve_model(settings.model)).config
    widest = max(DTYPE_BYTES, key=lambda dtype: DTYPE_BYTES[dtype])
    dtype = widest if settings.kv_dtype == "auto" else settings.kv_dtype
    layout = KvLayout(dtype, config.num_layers, config.num_kv_heads, config.head_dim, settings.block_size)
    return (layout.blocks_for(max(num_tokens, config.max_positions)) + 1) * layout.block_bytes


def _fill_with_noise(pool: KvPool) -> None:
    """The same block everywhere, in whatever the pool holds."""
    noise = torch.randn(pool.layout.block_shape, generator=torch.Generator().manual_seed(1))
    if pool.scales is not None:
        pool.scales.fill_(KV_SCALE)
        noise = (noise / KV_SCALE).clamp(-120, 120)
    pool.elements.copy_(noise.to(pool.elements.dtype).expand_as(pool.elements))
