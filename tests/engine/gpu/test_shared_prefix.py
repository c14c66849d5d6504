"""A prefix that sequences share is attended once, and nothing else changes."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.engine.kernels.attention import QuerySpan, attend, plan_attention
from splitfire.engine.kernels.gpu import shared_prefixes as prefixes_module
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_shared import Shared, attend_shared
from splitfire.engine.kernels.gpu.row_states import RowStates
from splitfire.engine.kernels.gpu.shared_prefixes import Prefix, prefix_columns, shared_prefixes
from splitfire.engine.kernels.gpu.spans import UNIT, Spans, cut
from splitfire.engine.pool import LayerCache
from tests.engine.test_kernels import BLOCK, DIM, GROUP, KV_HEADS, attention_case, quantised_cache

CPU = torch.device("cpu")
SCALE = DIM**-0.5


def shared_case(shapes: list[tuple[int, int]], prefixes: list[Prefix]) -> tuple[torch.Tensor, torch.Tensor, list[QuerySpan]]:
    """attention_case whose members have the blocks of their prefix's first; the blocks they had themselves are poisoned."""
    q, cache, spans, _ = attention_case(shapes)
    for prefix in prefixes:
        count = prefix.num_tokens // BLOCK
        common = spans[prefix.members[0]].block_ids[:count]
        for member in prefix.members[1:]:
            span = spans[member]
            cache[list(span.block_ids[:count])] = torch.nan
            spans[member] = QuerySpan(span.begin, span.end, span.context_len, common + span.block_ids[count:])
    return q, cache, spans


def attend_with(q: torch.Tensor, cache: LayerCache, spans: list[QuerySpan], prefixes: list[Prefix], programs: int) -> torch.Tensor:
    """Both passes, with memory poisoned, and places for groups and sequences that are not there."""
    num_heads, spare = q.shape[1], 2
    tables = np.full((len(spans), max(len(s.block_ids) for s in spans) + 1), 1 << 30, np.int32)
    for i, span in enumerate(spans):
        tables[i, : len(span.block_ids)] = span.block_ids
    begins = np.array([s.begin for s in spans] + [spans[-1].end])
    columns = prefix_columns(prefixes, begins, np.arange(len(spans)), len(prefixes) + spare, len(q) + spare)
    on_device = torch.from_numpy(tables)

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor([*values, *[0] * spare], dtype=torch.int32)

    own = Spans(column([s.begin for s in spans]), column([s.end for s in spans]), column([s.context_len for s in spans]),
                column(list(range(len(spans)))), on_device)  # fmt: skip
    begin, end, context, lane, members = map(
        torch.from_numpy, (columns.begins, columns.ends, columns.contexts, columns.lanes, columns.members)
    )
    groups = Spans(begin, end, context, lane, on_device, members)
    tall, shape = (DecodeShape(decode_shape(GROUP, rows, 1).rows, programs) for rows in (64, max(s.end - s.begin for s in spans)))
    states = RowStates.of(len(q), num_heads, DIM, CPU)
    for tensor in states:
        tensor.fill_(torch.nan)
    shared = Shared(groups, cut(groups, tall.tile_tokens(GROUP), KV_HEADS, None), tall, Partials.of(tall, DIM, CPU), states)
    attend_shared(q, cache, shared, SCALE)
    rest = cut(own, shape.tile_tokens(GROUP), KV_HEADS, None, column(columns.starts.tolist()))
    out = torch.full_like(q, torch.nan)
    attend_decode(q, cache, own, rest, shape, Partials.of(shape, DIM, CPU), SCALE, None, out, states)
    return out


CASES = {
    "one group, its prefix all but the last token": ([(1, 129), (1, 200), (1, 129)], [Prefix((0, 1, 2), 128)]),
    "two groups between others": (
        [(1, 70), (3, 200), (1, 90), (2, 300), (1, 65), (1, 450)],
        [Prefix((0, 2, 4), 64), Prefix((1, 5), 192)],
    ),
    "more rows than a tile": ([(13, 100), (9, 150), (7, 80)], [Prefix((0, 1, 2), 64)]),
    "no group": ([(1, 70), (2, 130)], []),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *(("more rows than a tile", dtype) for dtype in (torch.int8, torch.float8_e4m3fn)),
    ],
)
def test_it_is_plain_attention(name: str, dtype: torch.dtype) -> None:
    shapes, prefixes = CASES[name]
    q, elements, spans = shared_case(shapes, prefixes)
    cache = LayerCache(elements, None) if dtype == torch.float32 else quantised_cache(elements, dtype)
    want = attend(q, cache, plan_attention(spans, CPU), SCALE)
    torch.testing.assert_close(attend_with(q, cache, spans, prefixes, programs=3), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 7, 25])
def test_it_is_so_with_any_number_of_programs(programs: int) -> None:
    """Items of groups and of what is left are cut anywhere."""
    shapes, prefixes = CASES["two groups between others"]
    q, elements, spans = shared_case(shapes, prefixes)
    cache = LayerCache(elements, None)
    want = attend(q, cache, plan_attention(spans, CPU), SCALE)
    torch.testing.assert_close(attend_with(q, cache, spans, prefixes, programs), want, rtol=1e-5, atol=1e-5)


def test_the_shared_units_are_counted_once() -> None:
    """Eight sequences with one token each and 1024 tokens in common: 16 units of the group, one of each sequence, for a KV head."""
    eight = torch.arange(8, dtype=torch.int32)
    spans = Spans(eight, eight + 1, torch.full_like(eight, 1030), eight, torch.zeros(8, 40, dtype=torch.int32))
    assert cut(spans, 4, 2, None, torch.full_like(eight, 1024)).unit_ends[-1] == 8 * 2
    group = Spans(eight[:1], eight[:1] + 8, torch.tensor([1024], dtype=torch.int32), eight[:1], spans.tables, members=eight)
    assert cut(group, 16, 2, None).unit_ends.tolist() == [16 * 2]


# -- which sequences

FEW = 512  # tokens, instead of LEAST_SAVED: then small batches have prefixes worth sharing


def saved(prefixes: list[Prefix]) -> int:
    return sum((len(prefix.members) - 1) * prefix.num_tokens for prefix in prefixes)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Sequences that branch from one another, what is past their blocks left as it may be: like the others' or not."""
    block_size = draw(st.sampled_from([16, 32, 64, 128]))
    width, fresh = 4096 // block_size, iter(range(1, 1 << 20))
    rows: list[np.ndarray] = []
    for _ in range(draw(st.integers(1, 12))):
        row = np.array([next(fresh) for _ in range(width)], np.int32)
        branches = draw(st.integers(0, 3)) > 0
        if rows and branches:
            parent = rows[draw(st.integers(0, len(rows) - 1))]
            depth = draw(st.integers(0, width))
            row[:depth] = parent[:depth]
        rows.append(row)
    known = [draw(st.integers(0, 4096)) for _ in rows]
    return np.stack(rows), np.array(known), block_size


@settings(max_examples=150, deadline=None)
@given(batches())
def test_members_share_what_is_said_and_see_all_of_it(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
    tables, known, block_size = batch
    with mock.patch.object(prefixes_module, "LEAST_SAVED", FEW):
        found = shared_prefixes(tables, known, block_size)
    seen = [member for prefix in found for member in prefix.members]
    assert len(seen) == len(set(seen)), "each in one group at most"
    for prefix in found:
        assert len(prefix.members) > 1 and prefix.num_tokens % UNIT == 0 and prefix.num_tokens % block_size == 0
        assert (known[list(prefix.members)] >= prefix.num_tokens).all()
        common = tables[list(prefix.members), : prefix.num_tokens // block_size]
        assert (common == common[0]).all()
    assert not found or saved(found) >= FEW


@settings(max_examples=60, deadline=None)
@given(batches())
def test_no_single_group_would_save_more(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
    tables, known, block_size = batch
    with mock.patch.object(prefixes_module, "LEAST_SAVED", FEW):
        found = saved(shared_prefixes(tables, known, block_size))
    step = max(UNIT, block_size)
    for row, tokens in zip(tables, known, strict=True):
        for shared in range(step, int(tokens) + 1, step):
            alike = (tables[:, : shared // block_size] == row[: shared // block_size]).all(1) & (known >= shared)
            alone = (int(alike.sum()) - 1) * shared
            if shared >= prefixes_module.SHORTEST and alone >= FEW:
                assert found >= alone


def test_a_longer_prefix_of_some_and_a_short_one_of_all() -> None:
    """Whatever saves more: here two groups of their own, there one of all."""
    tables = np.arange(6 * 256, dtype=np.int32).reshape(6, 256)
    tables[:, :32] = tables[0, :32]
    known = np.full(6, 4095)
    assert shared_prefixes(tables, known, 16) == []  # 5 x 512 tokens
    tables[[1, 4], :200] = tables[1, :200]
    tables[[0, 2, 5], :250] = tables[0, :250]
    assert sorted(shared_prefixes(tables, known, 16), key=lambda p: p.members) == [Prefix((0, 2, 5), 3968), Prefix((1, 4), 3200)]
    tables[:, :180] = tables[0, :180]
    assert [prefix.members for prefix in shared_prefixes(tables, known, 16)] == [(0, 1, 2, 3, 4, 5)]


def test_groups_that_save_the_least_are_left_out_where_there_is_no_place() -> None:
    begins = np.array([0, 1, 3, 4, 5, 8])
    columns = prefix_columns([Prefix((0, 2), 64), Prefix((1, 4), 128)], begins, np.arange(5) + 10, 1, 9)
    assert (columns.begins.tolist(), columns.ends.tolist(), columns.contexts.tolist(), columns.lanes.tolist()) == (
        [0],
        [5],
        [128],
        [11],
    )
    assert columns.members.tolist() == [1, 2, 5, 6, 7, 0, 0, 0, 0]
    assert columns.starts.tolist() == [0, 128, 0, 0, 128]
