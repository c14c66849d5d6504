"""`prepare`: a step's inputs, made on the device from a few numbers a sequence and what the device keeps: block tables, and the newest
token of each lane, which the host may not know yet. `settle` is its counterpart after the draw: which drafts were right, and what is
the newest token now.

`words` is all that the host sends of a step, in one piece of int64:

    number of sequences | number of rows | lanes | begins | ends | contexts, `capacity` of each | token ids, `num_rows` of them
    and where prefixes are shared (attend_shared.py): begins | ends | contexts | lanes of groups | their members | starts of sequences

A token id below zero is the newest of its sequence's lane. What is past the sequences and rows there are is anything, so one shape
holds any smaller step: rows past the last one are written nowhere, and places past the last sequence are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.gpu.shared_prefixes import Prefix, prefix_columns
from splitfire.engine.kernels.gpu.spans import Spans
from splitfire.engine.kernels.rope import CacheTargets

FEW_ROWS = 129  # new tokens of a sequence that `attend_decode` takes: the newest, and as many drafts as drafters propose
HEAD = 2  # words before the columns
HEAD_WORDS: tl.constexpr = tl.constexpr(HEAD)  # as kernels know it
COLUMNS = 4  # lanes, begins, ends, contexts
PIECE = 128  # rows and places that a program makes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step on the device; all of it written by `prepare`."""

    token_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    row_lanes: Tensor  # [num_rows] int32; -1 past the last row
    targets: CacheTargets
    few: Spans  # sequences of at most FEW_ROWS new tokens; places of the others are empty
    many: Spans  # the others


@dataclass(frozen=True, slots=True)
class SharedPlaces:
    """Prefixes that sequences of a step have in common."""

    groups: Spans
    starts: Tensor  # [capacity] int32: where each sequence's own context begins


def num_words(capacity: int, num_rows: int, num_groups: int = 0) -> int:
    own = HEAD + COLUMNS * capacity + num_rows
    return own + COLUMNS * num_groups + num_rows + capacity if num_groups else own


def words_of(
    batch: StepBatch, capacity: int, num_rows: int, prefixes: Sequence[Prefix] = (), num_groups: int = 0
) -> NDArray[np.int64]:
    """For a step of at most `capacity` sequences and `num_rows` rows; of prefixes the `num_groups` that save most."""
    count, rows = len(batch.lanes), len(batch.token_ids)
    words = np.zeros(num_words(capacity, num_rows, num_groups), np.int64)
    words[:HEAD] = count, rows
    columns = words[HEAD : HEAD + COLUMNS * capacity].reshape(COLUMNS, capacity)
    columns[:, :count] = batch.lanes, batch.query_begins[:-1], batch.query_begins[1:], batch.context_lens
    words[HEAD + COLUMNS * capacity :][:rows] = batch.token_ids
    if num_groups:
        columns_of = prefix_columns(prefixes, batch.query_begins, batch.lanes, num_groups, num_rows)
        tail = np.concatenate(astuple(columns_of))
        words[num_words(capacity, num_rows) :][: len(tail)] = tail
    return words


def shared_places(words: Tensor, tables: Tensor, capacity: int, num_rows: int, num_groups: int) -> SharedPlaces:
    """As kernels take them. words [num_words(capacity, num_rows, num_groups)]."""
    tail = words[num_words(capacity, num_rows) :].to(torch.int32)
    begins, ends, contexts, lanes, members, starts = tail.split([num_groups] * COLUMNS + [num_rows, capacity])
    return SharedPlaces(Spans(begins, ends, contexts, lanes, tables, members), starts)


def prepare(
    words: Tensor,  # [num_words(capacity, num_rows)] int64
    newest: Tensor | None,  # [num_lanes] int64: token ids; None where the words have all of them
    tables: Tensor,  # [num_lanes, max_blocks] int32
    tokens: Tensor | None,  # [num_blocks, block_size] int32, written: what each place of the pool will hold the KV of
    capacity: int,
    num_rows: int,
    block_size: int,
) -> Prepared:
    """What the host would have had to send of it."""
    rows = torch.empty(4, num_rows, dtype=torch.int64, device=words.device)
    row_lanes = torch.empty(num_rows, dtype=torch.int32, device=words.device)
    places = torch.empty(6, capacity, dtype=torch.int32, device=words.device)
    _prepare[triton.cdiv(max(num_rows, capacity), PIECE),](
        words, newest, tables, tables.stride(0), tokens, rows, row_lanes, places, capacity, num_rows, block_size, FEW_ROWS, PIECE,
    )  # fmt: skip
    contexts, lanes = places[4], places[5]
    return Prepared(
        rows[0], rows[1], row_lanes, CacheTargets(rows[2], rows[3]),
        Spans(places[0], places[1], contexts, lanes, tables), Spans(places[2], places[3], contexts, lanes, tables),
    )  # fmt: skip


def settle(
    words: Tensor,  # of a step in which every sequence has its newest token and drafts that may follow
    token_ids: Tensor,  # [num_rows] int64: as `prepare` made them
    drawn: Tensor,  # [num_rows] int64: the token after each row; below zero where there is none
    newest: Tensor,  # [num_lanes] int64, written: the last token that each sequence got
    capacity: int,
) -> None:
    """A draft is right when it equals the token drawn before it: the row after it then counts."""
    _settle[triton.cdiv(capacity, PIECE),](words, token_ids, drawn, newest, capacity, PIECE)


@triton.jit
def columns_of(words, capacity):
    """Where they are: lanes, begins, ends, contexts, and token ids."""
    first = words + HEAD_WORDS
    return first, first + capacity, first + 2 * capacity, first + 3 * capacity, first + 4 * capacity


@triton.jit
def _prepare(
    words,
    newest,  # [num_lanes]
    tables,  # [num_lanes, max_blocks]
    table_stride,
    tokens,  # [num_blocks, block_size], written
    rows,  # [4, num_rows], written: token ids, positions, blocks, offsets
    row_lanes,  # [num_rows], written
    places,  # [6, capacity], written: begins and ends of the few, of the many; contexts, lanes
    capacity,
    num_rows,
    block_size,
    FEW_ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    num_sequences, rows_there = tl.load(words), tl.load(words + 1)
    lanes, begins, ends, contexts, given = columns_of(words, capacity)

    is_place, is_sequence = i < capacity, i < num_sequences
    begin, end = tl.load(begins + i, is_sequence, 0), tl.load(ends + i, is_sequence, 0)
    is_few = end - begin <= FEW_ROWS
    tl.store(places + i, tl.where(is_few, begin, 0).to(tl.int32), is_place)
    tl.store(places + capacity + i, tl.where(is_few, end, 0).to(tl.int32), is_place)
    tl.store(places + 2 * capacity + i, tl.where(is_few, 0, begin).to(tl.int32), is_place)
    tl.store(places + 3 * capacity + i, tl.where(is_few, 0, end).to(tl.int32), is_place)
    tl.store(places + 4 * capacity + i, tl.load(contexts + i, is_sequence, 0).to(tl.int32), is_place)
    tl.store(places + 5 * capacity + i, tl.load(lanes + i, is_sequence, 0).to(tl.int32), is_place)

    # The sequence of each row: the first that ends after it.
    is_row, is_there = i < num_rows, i < rows_there
    low = tl.zeros([PIECE], tl.int64)
    high = low + num_sequences
    span = num_sequences
    while span > 0:
        middle = (low + high) // 2
        is_open = low < high
        is_after = tl.load(ends + middle, is_open, 0) > i
        high = tl.where(is_open & is_after, middle, high)
        low = tl.where(is_open & (is_after == 0), middle + 1, low)
        span = span // 2
    lane = tl.load(lanes + low, is_there, 0)
    position = tl.load(contexts + low, is_there, 0) - tl.load(ends + low, is_there, 0) + i
    token = tl.load(given + i, is_there, 0)
    if newest is not None:
        # The newest is below zero where logits were not finite; its sequence ends before anybody reads what comes of it.
        token = tl.where(token < 0, tl.maximum(tl.load(newest + lane, is_there, 0), 0), token)
    block = tl.load(tables + lane * table_stride + position // block_size, is_there, -1).to(tl.int64)
    if tokens is not None:
        tl.store(tokens + block * block_size + position % block_size, token.to(tl.int32), is_there)
    tl.store(rows + i, token, is_row)
    tl.store(rows + num_rows + i, tl.where(is_there, position, 0), is_row)
    tl.store(rows + 2 * num_rows + i, block, is_row)
    tl.store(rows + 3 * num_rows + i, tl.where(is_there, position % block_size, 0), is_row)
    tl.store(row_lanes + i, tl.where(is_there, lane, -1).to(tl.int32), is_row)


@triton.jit
def _settle(
    words,
    token_ids,  # [num_rows]
    drawn,  # [num_rows]
    newest,  # [num_lanes], written
    capacity,
    PIECE: tl.constexpr,
):
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    is_there = i < tl.load(words)
    lanes, begins, ends, _contexts, _given = columns_of(words, capacity)
    lane, row, end = tl.load(lanes + i, is_there, 0), tl.load(begins + i, is_there, 0), tl.load(ends + i, is_there, 0)
    token = tl.load(drawn + row, is_there, -1)
    goes_on = is_there & (row + 1 < end)
    while tl.max(goes_on.to(tl.int32), 0) > 0:
        goes_on = goes_on & (tl.load(token_ids + row + 1, goes_on, -1) == token)
        row = tl.where(goes_on, row + 1, row)
        token = tl.where(goes_on, tl.load(drawn + row, goes_on, -1), token)
        goes_on = goes_on & (row + 1 < end) & (token >= 0)
    tl.store(newest + lane, token, is_there)
