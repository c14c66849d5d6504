"""Ranks: which part each has, that their parts make up the whole, and the same tokens from one rank and from several."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config

from splitfire.core.errors import ConfigError
from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.engine import checkpoint
from splitfire.engine.batch import StepBatch
from splitfire.engine.blocks import BlockCopy, BlockId, BlockPool
from splitfire.engine.engine import Engine
from splitfire.engine.formats.stored import StoredMatrix
from splitfire.engine.kernels.linear import (
    GroupedMatrix,
    Int8Matrix,
    Matrix,
    int4_eighth,
    linear,
    pack_int4,
    quantise_rows,
)
from splitfire.engine.models.transformer import Weights
from splitfire.engine.parallel import weights
from splitfire.engine.parallel.channel import Channel
from splitfire.engine.parallel.follower import serve
from splitfire.engine.parallel.followers import Followers
from splitfire.engine.parallel.group import Group, join
from splitfire.engine.parallel.leader import Leader
from splitfire.engine.parallel.matrices import columns, rows
from splitfire.engine.parallel.pack import pack, unpack
from splitfire.engine.parallel.plan import RankPlan
from splitfire.engine.parallel.pools import ShardedPool, map_pool, new_memory
from splitfire.engine.parallel.shards import kept_columns, kept_rows, require_shards, shard_layout, share
from splitfire.engine.parallel.steps import decode, encode
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model, Runner
from splitfire.engine.scheduler import Budget
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import VOCAB, family_configs, save_checkpoint
from tests.engines import assert_no_leaks, drain, load_model, make_engine, make_spec, tokens_of

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 40, 16
CONFIG = ModelDir(Path("models/pico")).config

# -- shares


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 8))
def test_shares_are_the_whole_in_order_and_nobody_has_much_more(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) == -(-count // size)
    if count % size == 0:
        assert {len(part) for part in shares} == {count // size}


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_a_rank_has_the_queries_of_its_keys(size: int, kv_heads: int, group: int, width: int) -> None:
    config = replace(
        CONFIG, num_heads=size * kv_heads * group, num_kv_heads=size * kv_heads, head_dim=8, intermediate_size=size * width
    )
    at = "model.layers.0.self_attn."
    q, k, v, out = (
        [cut(config, f"{at}{name}", rank, size) or range(0) for rank in range(size)]
        for name, cut in (("q_proj", kept_rows), ("k_proj", kept_rows), ("v_proj", kept_rows), ("o_proj", kept_columns))
    )
    for parts, count in ((q, config.num_heads * 8), (k, config.num_kv_heads * 8)):
        assert [row for part in parts for row in part] == list(range(count))
    assert k == v and q == out, "what out takes is what attention gives"
    for queries, keys in zip(q, k, strict=True):
        assert {row // 8 // group for row in queries} == {row // 8 for row in keys}
    gate, up, down = (
        [cut(config, f"model.layers.0.mlp.{name}", rank, size) or range(0) for rank in range(size)]
        for name, cut in (("gate_proj", kept_rows), ("up_proj", kept_rows), ("down_proj", kept_columns))
    )
    assert gate == up == down and [row for part in gate for row in part] == list(range(size * width))


def test_a_rank_never_holds_two_whole_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it reads: each is cut before the next comes."""
    save_checkpoint(family_configs()["llama"], tmp_path)
    events: list[str] = []
    read, part = checkpoint._Loader.matrix, weights._Cutter.matrix

    def reading(loader: checkpoint._Loader, matrix: StoredMatrix) -> Matrix:
        events.append(f"read {matrix.name}")
        return read(loader, matrix)

    def cutting(cutter: weights._Cutter, name: str, whole: Matrix) -> Matrix:
        events.append(f"cut {name}")
        return part(cutter, name, whole)

    monkeypatch.setattr(checkpoint._Loader, "matrix", reading)
    monkeypatch.setattr(weights._Cutter, "matrix", cutting)
    options = checkpoint.LoadOptions(torch.float32, CPU)
    shard = weights.load_shard(ModelDir(tmp_path), options, 1, 2, CPU)
    names = [event.removeprefix("read ") for event in events[::2]]
    assert len(names) > 9 and events[1::2] == [f"cut {name}" for name in names]
    whole = checkpoint.load_weights(ModelDir(tmp_path), options)
    sizes = [(a.numel(), b.numel()) for a, b in zip(_matrices(shard), _matrices(whole), strict=True)]
    assert all(2 * mine == theirs for mine, theirs in sizes)


def _matrices(held: Weights) -> list[Tensor]:
    found = [m for layer in held.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return [cast(Tensor, m) for m in (*found, held.lm_head)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 6}, "num_attention_heads = 6"),
        ({"num_kv_heads": 2}, "num_key_value_heads = 2; use a divisor of 2"),
        ({"intermediate_size": 90}, "intermediate_size = 90"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(changes: dict[str, Any], says: str) -> None:
    config = replace(CONFIG, num_heads=8, num_kv_heads=4, intermediate_size=96)
    require_shards(config, 4)
    with pytest.raises(ConfigError, match=f"tensor_parallel is 4, which does not divide the model's {says}"):
        require_shards(replace(config, **changes), 4)


# -- steps


@pytest.mark.parametrize(("context_lens", "logits"), [((1,), (0,)), ((16, 17, 640), (1, 2)), ((33, 5), ())])
def test_a_step_arrives_as_it_was_sent(context_lens: tuple[int, ...], logits: tuple[int, ...]) -> None:
    draw = np.random.default_rng(3)
    lens = np.array(context_lens)
    counts = np.minimum(lens, draw.integers(1, 5, len(lens)))
    begins = np.concatenate(([0], counts.cumsum()))
    tables = draw.integers(0, 1 << 30, (9, 64), np.int32)
    lanes = draw.permutation(9)[: len(lens)]
    num_rows = int(begins[-1])
    batch = StepBatch(
        draw.integers(0, 1 << 40, num_rows), draw.integers(0, 999, num_rows), begins, lens, lanes, tables, np.array(logits, np.int64), 1
    )  # fmt: skip
    arrived = decode(bytearray(encode(batch, 16)))
    for name in ("token_ids", "positions", "query_begins", "context_lens", "logit_rows"):
        assert np.array_equal(getattr(arrived, name), getattr(batch, name)), name
    assert arrived.num_decoding == 1
    for i, length in enumerate(context_lens):
        blocks = -(-length // 16)
        assert np.array_equal(arrived.block_tables[arrived.lanes[i], :blocks], tables[lanes[i], :blocks])


# -- matrices


def grouped(dtype: torch.dtype, out: int, width: int, group_size: int, *, order: bool = False) -> GroupedMatrix:
    generator = torch.Generator().manual_seed(out)
    numbers = torch.randint(-8, 8, (out, width), generator=generator).to(torch.int8)
    num_groups = -(-width // group_size)
    elements = pack_int4(numbers, int4_eighth(width, group_size)) if dtype == torch.int32 else numbers.to(dtype)
    return GroupedMatrix(
        elements, torch.rand(out, num_groups, generator=generator) + 0.1,
        torch.randint(-3, 3, (out, num_groups), generator=generator).to(torch.int8), group_size,
        torch.randperm(width, generator=generator) if order else None,
    )  # fmt: skip


MATRICES: dict[str, Matrix] = {
    "plain": torch.randn(48, 96, generator=torch.Generator().manual_seed(1)),
    "bf16": torch.randn(48, 96, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "int8": quantise_rows(torch.randn(48, 96, generator=torch.Generator().manual_seed(2))),
    "int8 groups": grouped(torch.int8, 48, 96, 16),
    "int8 groups that are cut": grouped(torch.int8, 48, 96, 32),
    "fp8 groups": grouped(torch.float8_e4m3fn, 48, 128, 32),
    "fp8 groups, the last one shorter": grouped(torch.float8_e4m3fn, 48, 96, 20),
    "int4": grouped(torch.int32, 48, 512, 32),
    "int4, groups that are cut": grouped(torch.int32, 48, 96, 48),
    "int4 in another order": grouped(torch.int32, 48, 256, 32, order=True),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("size", [2, 4])
def test_parts_make_up_the_matrix(name: str, size: int) -> None:
    matrix = MATRICES[name]
    whole = transposed(matrix)
    picked = [range(3, 20), range(40, 48), range(20, 21)]
    assert torch.equal(transposed(rows(matrix, picked)), torch.cat([whole[:, part.start : part.stop] for part in picked], 1))
    for rank in range(size):
        part = share(len(whole), rank, size)
        assert torch.equal(transposed(columns(matrix, part, torch.float32)), whole[part.start : part.stop])


def transposed(matrix: Matrix) -> torch.Tensor:
    """[in, out]: what it means, each number in a product of its own."""
    width = matrix.elements.shape[1] if isinstance(matrix, Int8Matrix) else matrix.shape[1]
    return linear(torch.eye(width, dtype=matrix.dtype if isinstance(matrix, torch.Tensor) else torch.float32), matrix)


def test_a_grouped_matrix_keeps_its_bits_where_it_can() -> None:
    matrices = {name: m for name, m in MATRICES.items() if isinstance(m, GroupedMatrix)}
    halves = {name: columns(m, share(m.shape[1], 1, 2), torch.float32) for name, m in matrices.items()}
    assert [name for name, half in halves.items() if isinstance(half, GroupedMatrix)] == ["int8 groups", "fp8 groups", "int4"]
    kept = [half.elements.dtype for half in halves.values() if isinstance(half, GroupedMatrix)]
    assert kept == [torch.int8, torch.float8_e4m3fn, torch.int32]


# -- ranks as threads


class Threads(Followers):
    """Followers that are threads of this test: the same code, but for processes and their memory."""

    def __init__(self, plan: RankPlan, timeout_s: float) -> None:
        self._plan, self._timeout_s = plan, timeout_s
        self._meeting_file = os.memfd_create("test")
        self._processes, self._channels = [], []
        self.pools = [KvPool(plan.rank_layout, plan.num_blocks, CPU) for _ in range(plan.size)]
        self.threads = []
        for rank in range(1, plan.size):
            mine, theirs = socket.socketpair()
            self._channels.append(Channel(mine))
            self.threads.append(threading.Thread(target=self._follow, args=(rank, Channel(theirs)), name=f"rank-{rank}"))
        for pool in self.pools:
            pool.raw.fill_(0xFF)  # NaN, or values out of place
        for thread in self.threads:
            thread.start()

    def model(self, rank: int) -> Model:
        model = ModelDir(Path(self._plan.model))
        shard = self._plan.load(model, rank)
        return self._plan.build(shard, model.config, join(rank, self._plan.size, CPU, self._meeting_file, self._timeout_s))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        os.close(self._meeting_file)

    def _follow(self, rank: int, channel: Channel) -> None:
        try:
            serve(self.model(rank), self.pools[rank], channel)
        finally:
            channel.close()


@contextmanager
def parallel_engine(path: Path, size: int, *, is_int8: bool = False, kv_dtype: str = "fp32") -> Iterator[Engine]:
    config = ModelDir(path).config
    layout = KvLayout(kv_dtype, config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
    plan = RankPlan(
        str(path), size, "cpu", "fp32", "fp32", is_int8, False, False, True, config.max_positions, layout, NUM_BLOCKS, 1
    )
    ranks = Threads(plan, 20.0)
    try:
        runner = Runner(Leader(config, ranks.model(0), ranks), ShardedPool(layout, ranks.pools[0], ranks.pools[1:]))
        yield Engine(runner, BlockPool(NUM_BLOCKS), Budget(64, 16), lambda: 0.0)
    finally:
        ranks.close()


def run(engine: Engine, vocab: int) -> list[list[int]]:
    """Prompts of awkward lengths that join at different steps, in chunks; the tokens of each."""
    draw = np.random.default_rng(11)
    specs = [make_spec(draw.integers(0, vocab, n).tolist(), 4 + n % 3, block_size=BLOCK_SIZE) for n in (1, 15, 16, 17, 100)]
    updates: list[SequenceUpdate] = []
    for spec in specs:
        engine.add(spec)
        updates += engine.step().updates
    updates += drain(engine)
    assert_no_leaks(engine)
    return [tokens_of(updates, spec) for spec in specs]


def four_kv_heads() -> Any:
    """For four ranks; a vocabulary that they cannot share evenly."""
    base = family_configs()["qwen3"].to_dict()
    return Qwen3Config(**{**base, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCAB - 3})


@pytest.mark.parametrize(
    ("family", "size", "is_int8", "kv_dtype"),
    [
        ("llama-tied-bias", 2, False, "fp32"),
        ("qwen2", 2, False, "fp32"),
        ("qwen2", 2, True, "int8"),
        ("mistral-window", 2, False, "fp32"),
        ("qwen3, four heads", 4, False, "fp32"),
        ("qwen3, four heads", 4, True, "fp32"),
    ],
)
def test_tokens_and_kv_of_several_ranks_equal_those_of_one(
    family: str, size: int, is_int8: bool, kv_dtype: str, tmp_path: Path
) -> None:
    config = four_kv_heads() if family == "qwen3, four heads" else family_configs()[family]
    save_checkpoint(config, tmp_path)
    alone = make_engine(
        load_model(tmp_path, is_int8=is_int8), dtype=kv_dtype, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, chunk_tokens=64
    )
    alone.runner.pool.raw.fill_(0xFF)
    expected = run(alone, config.vocab_size)
    with parallel_engine(tmp_path, size, is_int8=is_int8, kv_dtype=kv_dtype) as engine:
        assert run(engine, config.vocab_size) == expected
        pool = engine.runner.pool
        assert isinstance(pool, ShardedPool)
        together = torch.cat([shard.elements for shard in pool.shards], 3).float()
    tolerance = 1e-4 if kv_dtype == "fp32" else 1  # a number at the edge between two may fall to either side
    torch.testing.assert_close(together, alone.runner.pool.elements.float(), rtol=1e-4, atol=tolerance, equal_nan=True)


def test_a_rank_that_does_not_come_or_stops_answering_is_an_error_in_time() -> None:
    meeting_file = os.memfd_create("test")
    with pytest.raises(RuntimeError):
        join(0, 2, CPU, meeting_file, 0.2)
    os.close(meeting_file)
    meeting_file = os.memfd_create("test")
    groups: list[Group] = []
    other = threading.Thread(target=lambda: groups.append(join(1, 2, CPU, meeting_file, 0.3)))
    other.start()
    group = join(0, 2, CPU, meeting_file, 0.3)
    other.join(10)
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        group.all_reduce(torch.ones(3))
    os.close(meeting_file)


def test_alone_nothing_is_asked_of_anybody() -> None:
    x = torch.randn(2, 5)
    assert Group().all_reduce(x) is x
    assert Group().gather_columns(x, 5) is x


# -- pools


def pools_of(dtype: str, size: int, seed: int = 0) -> KvPool:
    """Any bytes, in every place."""
    whole = KvLayout(dtype, num_layers=2, num_kv_heads=4, head_dim=24, block_size=16)
    generator = torch.Generator().manual_seed(seed)
    shards = [KvPool(shard_layout(whole, size), 9, CPU) for _ in range(size)]
    for shard in shards:
        shard.raw.copy_(torch.randint(0, 255, shard.raw.shape, dtype=torch.uint8, generator=generator))
    return shards[0] if size == 1 else ShardedPool(whole, shards[0], shards[1:])


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize(("ids", "num_tokens"), [([3], 1), ([5, 0, 8], 35), ([1, 2], 32)])
def test_blocks_are_the_same_bytes_whatever_the_number_of_ranks(dtype: str, ids: list[int], num_tokens: int) -> None:
    whole = pools_of(dtype, 1).layout
    first = torch.full((len(ids) * whole.block_bytes,), 0xEE, dtype=torch.uint8)
    sums = pack(pools_of(dtype, 1), ids, num_tokens, dtype, first)
    payload = first
    for size in (2, 4, 2, 1):  # from each to the next
        pool = pools_of(dtype, size, seed=size)
        untouched = [block for block in range(9) if block not in ids[::-1]]
        before = [shard.raw[untouched].clone() for shard in (pool.shards if isinstance(pool, ShardedPool) else [pool])]
        assert unpack(pool, ids[::-1], payload) == sums
        for shard, was in zip(pool.shards if isinstance(pool, ShardedPool) else [pool], before, strict=True):
            assert torch.equal(shard.raw[untouched], was)
        payload = torch.full_like(first, 0xEE)
        assert pack(pool, ids[::-1], num_tokens, dtype, payload) == sums
        assert torch.equal(payload, first)
        assert unpack(pool, ids, payload, digest=False) == pack(pool, ids, num_tokens, dtype, payload, digest=False) == []


@pytest.mark.parametrize(("source", "target"), [("bf16", "int8"), ("fp8_e4m3", "fp32"), ("fp32", "fp8_e4m3")])
def test_blocks_are_converted_as_one_rank_converts_them(source: str, target: str) -> None:
    split, whole = pools_of(source, 4), pools_of(source, 1)
    assert isinstance(split, ShardedPool)
    for shard in split.shards:
        shard.elements.copy_(torch.randn(shard.elements.shape, generator=torch.Generator().manual_seed(4)))
        if shard.scales is not None:
            shard.scales.fill_(0.5)
    whole.elements.copy_(torch.cat([shard.elements.float() for shard in split.shards], 3))
    if whole.scales is not None:
        whole.scales.fill_(0.5)
    payloads = [torch.full((2 * replace(whole.layout, dtype=target).block_bytes,), 0xEE, dtype=torch.uint8) for _ in range(2)]
    assert pack(split, [7, 2], 30, target, payloads[0]) == pack(whole, [7, 2], 30, target, payloads[1])
    assert torch.equal(*payloads)


def test_a_fork_copies_the_heads_of_every_rank() -> None:
    pool = pools_of("int8", 2)
    assert isinstance(pool, ShardedPool)
    pool.copy([BlockCopy(BlockId(2), BlockId(5)), BlockCopy(BlockId(2), BlockId(7))])
    for shard in pool.shards:
        assert torch.equal(shard.raw[5], shard.raw[2]) and torch.equal(shard.raw[7], shard.raw[2])
    pool.copy([])


def test_two_who_map_the_same_memory_see_each_other() -> None:
    layout = KvLayout("bf16", num_layers=1, num_kv_heads=1, head_dim=8, block_size=8)
    memory = new_memory(3 * layout.block_bytes)
    mine, theirs = map_pool(memory, layout, 3), map_pool(memory, layout, 3)
    os.close(memory)
    assert not mine.raw.any(), "zeros: what was never written is read, and masked"
    theirs.raw[1] = 7
    assert (mine.raw[1] == 7).all() and not mine.raw[0].any() and not mine.raw[2].any()
