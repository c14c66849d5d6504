"""attend_decode and attend_prefill against the torch `attend`, which is tested against plain attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from splitfire.engine.kernels.attention import QuerySpan, attend, plan_attention
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_prefill import attend_prefill, prefill_tile_tokens
from splitfire.engine.kernels.gpu.spans import UNIT, Cut, Spans, cut
from splitfire.engine.pool import LayerCache
from tests.engine.test_kernels import BLOCK, DIM, GROUP, KV_HEADS, attention_case, quantised_cache, reference

CPU = torch.device("cpu")
SCALE = DIM**-0.5
SHAPES = [
    [(1, 1)],
    [(1, UNIT), (1, UNIT + 1), (1, 300), (1, 1)],
    [(5, 5), (1, 400), (3, 129)],
    [(45, 100), (1, 9), (22, 90)],
]
CASES = [
    *((shapes, torch.float32) for shapes in SHAPES),
    *((SHAPES[i], dtype) for i in (1, 3) for dtype in (torch.int8, torch.float8_e4m3fn)),
]


def spans_of(spans: Sequence[QuerySpan], padding: int = 2) -> Spans:
    """Lanes in another order, tables with holes and what is past them out of place; places without a sequence before and after."""
    lanes = np.random.default_rng(0).permutation(len(spans) + 2)[: len(spans)]
    tables = np.full((len(spans) + 2, max(len(s.block_ids) for s in spans) + 3), 1 << 30, np.int32)
    for lane, span in zip(lanes, spans, strict=True):
        tables[lane, : len(span.block_ids)] = span.block_ids
    empty = [0] * padding

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor([*empty, *values, *empty], dtype=torch.int32)

    return Spans(
        column([s.begin for s in spans]), column([s.end for s in spans]), column([s.context_len for s in spans]),
        column(lanes.tolist()), torch.from_numpy(tables),
    )  # fmt: skip


def decode(q: Tensor, cache: LayerCache, spans: Sequence[QuerySpan], window: int | None, programs: int) -> Tensor:
    places = spans_of(spans)
    shape = DecodeShape(decode_shape(GROUP, max(s.end - s.begin for s in spans), 1).rows, programs)
    partials = Partials.of(shape, DIM, CPU)
    for memory in (partials.mixed, partials.states):
        memory.fill_(torch.nan)
    out = torch.full_like(q, torch.nan)
    how = cut(places, shape.tile_tokens(GROUP), KV_HEADS, window)
    attend_decode(q, cache, places, how, shape, partials, SCALE, window, out)
    return out


def prefill(q: Tensor, cache: LayerCache, spans: Sequence[QuerySpan], window: int | None) -> Tensor:
    places, tile_tokens = spans_of(spans), prefill_tile_tokens(GROUP, cache)
    how: Cut = cut(places, tile_tokens, KV_HEADS, window)
    out = torch.full_like(q, torch.nan)
    num_tiles = sum(-(-(s.end - s.begin) // tile_tokens) for s in spans)
    attend_prefill(q, cache, places, how, num_tiles + 1, SCALE, window, out)
    return out


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("shapes", "dtype"), CASES, ids=str)
def test_both_compute_what_the_torch_op_computes(shapes: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    q, elements, spans, _ = attention_case(shapes)
    cache = LayerCache(elements, None) if dtype == torch.float32 else quantised_cache(elements, dtype)
    want = attend(q, cache, plan_attention(spans, CPU), SCALE, window)
    for got in (decode(q, cache, spans, window, programs=5), prefill(q, cache, spans, window)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 7, 30])
def test_no_number_of_programs_changes_what_is_computed(programs: int) -> None:
    """Pieces begin and end anywhere: within an item, at its ends; one item has many of them, and some have none."""
    q, elements, spans, _ = attention_case([(1, 500), (1, 20), (2, 130)])
    cache = LayerCache(elements, None)
    want = attend(q, cache, plan_attention(spans, CPU), SCALE)
    torch.testing.assert_close(decode(q, cache, spans, None, programs), want, rtol=1e-5, atol=1e-5)


def test_pieces_are_equal_however_different_the_lengths() -> None:
    shapes = [(1, 6400), *[(1, 64)] * 20]
    places = Spans(
        torch.arange(21, dtype=torch.int32), torch.arange(1, 22, dtype=torch.int32),
        torch.tensor([context for _, context in shapes], dtype=torch.int32), torch.zeros(21, dtype=torch.int32), torch.zeros(1, 1),
    )  # fmt: skip
    how = cut(places, 16, 2, None)
    assert how.unit_ends.tolist() == [200 + 2 * i for i in range(21)]
    assert cut(places, 16, 2, 65).unit_ends[0] == 4  # a window of 65 tokens lies in two units
    assert cut(places, 16, 2, 64).unit_ends[0] == 2
    assert how.tile_ends.tolist() == list(range(1, 22))


@pytest.mark.parametrize("body", ["decode", "prefill"])
def test_rows_before_one_that_is_not_finite_do_not_know_of_it(body: str) -> None:
    """As of the torch op: a wrong draft may have any KV."""
    q, elements, [span], [kv] = attention_case([(40, 150)])
    at = 110 + 24
    elements[span.block_ids[at // BLOCK], 1, 1, at % BLOCK, 3] = torch.nan
    cache = LayerCache(elements, None)
    out = decode(q, cache, [span], None, 3) if body == "decode" else prefill(q, cache, [span], None)
    torch.testing.assert_close(out[:24], reference(q, kv, None)[:24], rtol=1e-5, atol=1e-5)
    assert out[24:, GROUP : 2 * GROUP].isnan().any(-1).all()
    assert out[24:, :GROUP].isfinite().all()  # the other head
