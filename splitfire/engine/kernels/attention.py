"""`attend`: causal attention of each sequence's new tokens over all its cached ones, read from the paged pool.

The torch body here is the reference and the fallback everywhere. It computes in fp32 and never builds a
[query, context] mask of a whole prompt: a prompt chunk is worked off in tiles of queries, each against the part of the
context it can see, and only the tile's own diagonal is masked. Sequences with one new token are padded and batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfire.engine.kernels.quantise import dequantise
from splitfire.engine.pool import LayerCache

QUERY_TILE = 128  # rows; scores of one tile are num_heads * 128 * context * 4 bytes
MAX_PADDING = 4.0  # decode rows are batched while the padded context is at most this many times the real one


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """Rows [begin, end) of the step belong to one sequence whose context, these rows included, is `context_len` tokens."""

    begin: int
    end: int
    context_len: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one new token each, padded to the longest block table among them."""

    rows: Tensor  # [batch] int64, rows of the step
    block_tables: Tensor  # [batch, max_blocks] int64, padded with block 0
    context_lens: Tensor  # [batch] int64


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several new tokens."""

    begin: int
    end: int
    context_len: int
    block_ids: Tensor  # [num_blocks] int64


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What every layer's `attend` of one step shares. Made once a step by `plan_attention`."""

    decodes: tuple[DecodeBatch, ...]
    chunks: tuple[Chunk, ...]


def plan_attention(spans: Sequence[QuerySpan], device: torch.device) -> AttentionStep:
    """`plan_batch` of sequences said one by one, whose rows follow one another."""
    num_blocks = np.array([len(s.block_ids) for s in spans])
    tables = np.zeros((len(spans), max(num_blocks)), np.int32)
    for table, span in zip(tables, spans, strict=True):
        table[: len(span.block_ids)] = span.block_ids
    begins = np.array([s.begin for s in spans] + [spans[-1].end])
    return plan_batch(begins, np.array([s.context_len for s in spans]), tables, num_blocks, device)


def plan_batch(
    query_begins: NDArray[np.int64],  # [num_sequences + 1]
    context_lens: NDArray[np.int64],  # [num_sequences]
    block_tables: NDArray[np.int32],  # [num_sequences, max_blocks]
    num_blocks: NDArray[np.int64],  # [num_sequences]; what is past them in a table may be anything
    device: torch.device,
) -> AttentionStep:
    """Sorts the step's sequences into padded decode batches and chunks."""
    counts = np.diff(query_begins)
    chunks = tuple(
        Chunk(
            int(query_begins[i]),
            int(query_begins[i + 1]),
            int(context_lens[i]),
            torch.from_numpy(block_tables[i, : num_blocks[i]].astype(np.int64)).to(device),
        )
        for i in (counts > 1).nonzero()[0]
    )
    singles = (counts == 1).nonzero()[0]
    singles = singles[np.argsort(-num_blocks[singles], kind="stable")]
    batches = []
    while len(singles):
        widths = num_blocks[singles]
        # Of a falling series the mean falls too, so those that fit are the leading ones.
        count = int((widths[0] * np.arange(1, len(widths) + 1) <= MAX_PADDING * widths.cumsum()).sum())
        batch, singles = singles[:count], singles[count:]
        tables = block_tables[batch, : widths[0]].astype(np.int64)
        tables[np.arange(widths[0]) >= widths[:count, None]] = 0
        arrays = (query_begins[batch], tables, context_lens[batch])
        batches.append(DecodeBatch(*(torch.from_numpy(array).to(device) for array in arrays)))
    return AttentionStep(tuple(batches), chunks)


def attend(
    q: Tensor,  # [num_tokens, num_heads, head_dim], as `rope_norm_write` returned them for this cache
    cache: LayerCache,
    step: AttentionStep,
    scale: float,
    window: int | None = None,  # how many of the last tokens a token sees, itself included; None: all
) -> Tensor:  # [num_tokens, num_heads, head_dim], dtype of q
    """Causal attention of each sequence's new tokens over all its cached ones. Their own KV is in the cache already."""
    out = torch.empty_like(q)
    for batch in step.decodes:
        out[batch.rows] = _attend_decodes(q[batch.rows], cache, batch, scale, window).to(q.dtype)
    for chunk in step.chunks:
        _attend_chunk(q, cache, chunk, scale, window, out)
    return out


def _gather(cache: LayerCache, block_ids: Tensor) -> Tensor:
    """[..., 2, num_kv_heads, block_size, head_dim] fp32 of block_ids [...]. What was never written may be anything, also NaN."""
    elements = cache.elements[block_ids]
    return elements.float() if cache.scales is None else dequantise(elements, cache.scales[block_ids])


def _attend_decodes(q: Tensor, cache: LayerCache, batch: DecodeBatch, scale: float, window: int | None) -> Tensor:
    """q [batch, num_heads, head_dim] -> the same shape, fp32."""
    num_rows, num_heads, head_dim = q.shape
    kv = _gather(cache, batch.block_tables)  # [batch, max_blocks, 2, num_kv_heads, block_size, head_dim]
    num_kv_heads, block_size = kv.shape[3], kv.shape[4]
    num_positions = kv.shape[1] * block_size
    keys, values = (kv[:, :, i].transpose(1, 2).reshape(num_rows, num_kv_heads, num_positions, head_dim) for i in (0, 1))
    grouped = q.float().view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * scale  # [batch, num_kv_heads, group, positions]
    positions = torch.arange(num_positions, device=q.device)
    seen = positions < batch.context_lens[:, None]
    if window is not None:
        seen &= positions >= batch.context_lens[:, None] - window
    scores.masked_fill_(~seen[:, None, None, :], float("-inf"))
    # Padding and the unwritten end of a block are somebody else's: a weight of zero does not hide a NaN there.
    values.masked_fill_(~seen[:, None, :, None], 0.0)
    return torch.matmul(scores.softmax(-1), values).reshape(num_rows, num_heads, head_dim)


def _attend_chunk(q: Tensor, cache: LayerCache, chunk: Chunk, scale: float, window: int | None, out: Tensor) -> None:
    """Writes rows [chunk.begin, chunk.end) of `out`."""
    num_heads, head_dim = q.shape[1:]
    kv = _gather(cache, chunk.block_ids)  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    num_positions = kv.shape[0] * block_size
    keys, values = (kv[:, i].transpose(0, 1).reshape(num_kv_heads, num_positions, head_dim) for i in (0, 1))
    group = num_heads // num_kv_heads
    for begin in range(chunk.begin, chunk.end, QUERY_TILE):
        end = min(begin + QUERY_TILE, chunk.end)
        first = chunk.context_len - (chunk.end - begin)  # position of the tile's first token
        last = chunk.context_len - (chunk.end - end)  # one past its last
        low = 0 if window is None else max(0, first - window + 1)
        rows = end - begin
        tile = (
            q[begin:end].float().view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
        )
        scores = torch.matmul(tile, keys[:, low:last].transpose(1, 2)).mul_(scale).view(num_kv_heads, group, rows, last - low)
        _mask_tile(scores, first, low, last, window)
        # A weight of zero does not hide a NaN: of a draft that is wrong, the rows before it must not know.
        own = values[:, first:last]
        is_bad = ~own.isfinite().all(2)  # [num_kv_heads, rows]
        own.masked_fill_(is_bad[:, :, None], 0.0)
        mixed = torch.matmul(scores.view(num_kv_heads, group * rows, last - low).softmax(-1), values[:, low:last])
        mixed = mixed.view(num_kv_heads, group, rows, head_dim)
        mixed = mixed.masked_fill((is_bad.cumsum(1) > 0)[:, None, :, None], float("nan"))
        own.masked_fill_(is_bad[:, :, None], float("nan"))  # for the tiles after this one
        out[begin:end] = mixed.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim).to(q.dtype)


def _mask_tile(scores: Tensor, first: int, low: int, last: int, window: int | None) -> None:
    """Hides from each row what comes after it, and what its window has left behind. scores: [..., rows, last - low]."""
    queries = torch.arange(first, last, device=scores.device)[:, None]
    diagonal = torch.arange(first, last, device=scores.device)
    scores[..., first - low :].masked_fill_(diagonal > queries, float("-inf"))
    if window is not None:
        positions = torch.arange(low, last, device=scores.device)
        scores.masked_fill_(positions <= queries - window, float("-inf"))
