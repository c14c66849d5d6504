"""Attention beside SDPA and FlexAttention on the same numbers, and beside the bytes or operations it takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from benchmarks.gpu.shapes import BLOCK_SIZE, LLAMA_8B, one_layer, random_pool, shape_of
from benchmarks.gpu.timing import Bench, Ceilings, Run, bound_row, floor_row, pair_row
from benchmarks.report import Row
from splitfire.engine.kernels.gpu.attend_decode import Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_prefill import attend_prefill, prefill_tile_tokens
from splitfire.engine.kernels.gpu.spans import Spans, cut
from splitfire.engine.pool import KvPool


class Layer:
    """One layer's queries and pool for sequences of given lengths, `rows` new tokens each."""

    def __init__(self, bench: Bench, contexts: Sequence[int], rows: int = 1, dtype: str = "") -> None:
        self.bench = bench
        self.config = one_layer(shape_of(LLAMA_8B, bench))
        self.contexts, self.rows = list(contexts), rows
        blocks = [-(-context // BLOCK_SIZE) for context in contexts]
        self.pool: KvPool = random_pool(self.config, bench, sum(blocks) * BLOCK_SIZE, dtype)
        ids = torch.randperm(sum(blocks)).int()
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for lane, mine in enumerate(ids.split(blocks)):
            tables[lane, : len(mine)] = mine
        number = torch.arange(len(blocks), dtype=torch.int32)
        columns = (number * rows, (number + 1) * rows, torch.tensor(self.contexts, dtype=torch.int32), number, tables)
        self.spans = Spans(*(column.to(bench.device) for column in columns))
        shape = (len(blocks) * rows, self.config.num_heads, self.config.head_dim)
        self.q = torch.randn(shape, device=bench.device, dtype=bench.dtype)
        self.out = torch.empty_like(self.q)

    @property
    def group(self) -> int:
        return self.config.num_heads // self.config.num_kv_heads

    @property
    def kv_bytes(self) -> int:
        """That attention has to read."""
        layout = self.pool.layout
        vector = layout.head_dim * self.pool.elements.element_size() + (2 if layout.is_quantised else 0)
        return sum(self.contexts) * 2 * layout.num_kv_heads * vector

    def decode(self) -> Run:
        """The whole of it: cutting up, attention, merging."""
        cache, scale = self.pool.layer(0), self.config.head_dim**-0.5
        shape = decode_shape(self.group, self.rows, self.bench.num_multiprocessors)
        partials = Partials.of(shape, self.config.head_dim, self.bench.device)

        def run() -> None:
            how = cut(self.spans, shape.tile_tokens(self.group), self.config.num_kv_heads, None)
            attend_decode(self.q, cache, self.spans, how, shape, partials, scale, None, self.out)

        return self.bench.graph(run)

    def prefill(self) -> Run:
        cache, scale = self.pool.layer(0), self.config.head_dim**-0.5
        tile = prefill_tile_tokens(self.group, cache)
        tiles = sum(-(-self.rows // tile) for _ in self.contexts)

        def run() -> None:
            how = cut(self.spans, tile, self.config.num_kv_heads, None)
            attend_prefill(self.q, cache, self.spans, how, tiles, scale, None, self.out)

        return self.bench.graph(run)

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [sequences, heads, tokens, dim] of equal lengths, gathered: what others take. Keys and values have KV heads only."""
        context, dim = self.contexts[0], self.config.head_dim
        elements = self.pool.elements[self.spans.tables.long(), 0]  # [sequences, blocks, 2, heads, block, dim]
        k, v = (elements[:, :, side].transpose(1, 2).flatten(2, 3)[:, :, :context].to(self.bench.dtype) for side in (0, 1))
        q = self.q.view(len(self.contexts), self.rows, -1, dim).transpose(1, 2)
        return q.contiguous(), k.contiguous(), v.contiguous()


def flex_run(bench: Bench, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Run:
    attend = flex.flex_attention if bench.is_dry else torch.compile(flex.flex_attention, dynamic=False)
    mask = None
    if is_causal:
        mask = flex.create_block_mask(lambda _b, _h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=bench.device)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def rows(bench: Bench, ceilings: Ceilings) -> list[Row]:
    return [*decode_rows(bench, ceilings), *mixed_rows(bench, ceilings), *slope_rows(bench), *prefill_rows(bench, ceilings)]


def decode_rows(bench: Bench, ceilings: Ceilings) -> list[Row]:
    """256 MB of KV: 16 sequences of 4096 tokens; then 64 rows of verification over it."""
    contexts = [70, 70] if bench.is_dry else [4096] * 16
    layer = Layer(bench, contexts)
    q, k, v = layer.contiguous()
    ours, sdpa, theirs = bench.times(
        layer.decode(), bench.graph(lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        flex_run(bench, q, k, v, is_causal=False),
    )  # fmt: skip
    torch.testing.assert_close(
        layer.out.view(len(contexts), -1, layer.config.head_dim).float(),
        functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0].float(), rtol=0.02, atol=0.01,
    )  # fmt: skip
    case = f"decode attention, {len(contexts)} x {contexts[0]}"
    return [
        floor_row(case, ours, layer.kv_bytes / ceilings.copy, "bytes over copy bandwidth", 0.95),
        pair_row(case, ours, sdpa, "SDPA", 1.0),
        pair_row(case, ours, theirs, "FlexAttention", 1.0),
    ]


def mixed_rows(bench: Bench, ceilings: Ceilings) -> list[Row]:
    contexts = [5, 200, 64] if bench.is_dry else [65536, 16384, *[4096] * 6, *[1024] * 24]
    layer = Layer(bench, contexts)
    [ours] = bench.times(layer.decode())
    ideal = layer.kv_bytes / ceilings.copy
    case = f"decode attention, {min(contexts)} to {max(contexts)} tokens mixed"
    return [
        floor_row(case, ours, ideal, "bytes over copy bandwidth"),
        bound_row(case, "time over ideal", "x", statistics.median(ours) / ideal, 1.15),
    ]


def slope_rows(bench: Bench) -> list[Row]:
    """What a token more of context costs, beside bf16: a difference, so that launches do not count."""
    short, long = ([64], [256]) if bench.is_dry else ([8192] * 8, [32768] * 8)
    dtypes = ("", "int8", "fp8_e4m3")
    runs = [Layer(bench, contexts, dtype=dtype).decode() for dtype in dtypes for contexts in (short, long)]
    medians = [statistics.median(times) for times in bench.times(*runs)]
    slopes = [medians[i + 1] - medians[i] for i in range(0, len(medians), 2)]
    return [bound_row(f"decode attention over {name} KV", "slope beside bf16", "x", slope / slopes[0], 0.55)
            for name, slope in zip(dtypes[1:], slopes[1:], strict=True)]  # fmt: skip


def prefill_rows(bench: Bench, ceilings: Ceilings) -> list[Row]:
    """A prompt of 8192 tokens, head_dim 128."""
    tokens = 70 if bench.is_dry else 8192
    layer = Layer(bench, [tokens], rows=tokens)
    q, k, v = layer.contiguous()
    ours, sdpa, theirs = bench.times(
        layer.prefill(), lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        flex_run(bench, q, k, v, is_causal=True),
    )  # fmt: skip
    operations = 2 * tokens**2 * layer.config.num_heads * layer.config.head_dim  # two products, half of each
    rate = operations / statistics.median(ours) / 1e12
    case = f"prefill attention, {tokens} tokens"
    return [
        Row(case, "rate", "TFLOP/s", rate, None, "", None, "at least 480 TFLOP/s", rate >= 480, 0.0),
        floor_row(case, ours, operations / ceilings.product, "operations over a product's rate"),
        pair_row(case, ours, theirs, "FlexAttention", 1.0),
        pair_row(case, ours, sdpa, "SDPA"),
    ]
