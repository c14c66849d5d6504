"""`adjust`: ../sample.py's penalties, biases and blocked tokens, on rows of logits. Which tokens a sequence has had stands on the device: its
block table leads to them as it leads to their KV, so a row knows of tokens that the host has not seen yet.

Tokens are counted into a row of numbers as long as the vocabulary, then each logit is changed by its number: no sort, no list of
different tokens. Two launches, and a third for biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # tokens at a time
WAS_PROMPTED = 1 << 30  # in a token's number; the rest counts how often it was put out


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What is to be done to some rows; a place for each of them. Edits [edit_begins[i], edit_begins[i + 1]) are row i's."""

    rows: Tensor  # [num_adjusted] int64, of the logits
    lanes: Tensor  # [num_adjusted] int32
    num_prompt: Tensor  # [num_adjusted] int32: tokens of the prompt
    repetition: Tensor  # [num_adjusted] fp32; 1: none
    presence: Tensor  # [num_adjusted] fp32
    frequency: Tensor  # [num_adjusted] fp32
    edit_begins: Tensor  # [num_adjusted + 1] int32
    edit_tokens: Tensor  # [num_edits] int32, none twice in a row's
    edit_values: Tensor  # [num_edits] fp32, added; -inf blocks


def adjust(
    logits: Tensor,  # [num_rows, vocab] fp32
    positions: Tensor,  # [num_rows] int64: of each row's token, the last that counts
    asked: Adjustments,
    tables: Tensor,  # [num_lanes, max_blocks] int32
    tokens: Tensor,  # [num_blocks, block_size] int32: what each place of the pool holds the KV of
) -> Tensor:  # [num_adjusted, vocab] fp32
    """Copies of rows `asked.rows`, changed."""
    num_adjusted, vocab = len(asked.rows), logits.shape[1]
    adjusted = torch.empty(num_adjusted, vocab, device=logits.device)
    if num_adjusted:
        counts = torch.zeros(num_adjusted, vocab, dtype=torch.int32, device=logits.device)
        most = tables.shape[1] * tokens.shape[1]  # tokens of a sequence
        _count[num_adjusted, min(64, triton.cdiv(most, PIECE))](
            counts, asked.rows, asked.lanes, asked.num_prompt, positions, tables, tables.stride(0), tokens, vocab, tokens.shape[1],
            WAS_PROMPTED, PIECE,
        )  # fmt: skip
        _apply[num_adjusted, triton.cdiv(vocab, PIECE)](
            logits, asked.rows, asked.repetition, asked.presence, asked.frequency, counts, adjusted, vocab, WAS_PROMPTED, PIECE
        )
        if len(asked.edit_tokens):
            _edit[num_adjusted,](adjusted, asked.edit_begins, asked.edit_tokens, asked.edit_values, vocab, PIECE)
    return adjusted


@triton.jit
def _count(
    counts,  # [num_adjusted, vocab], zeros; written
    rows,  # [num_adjusted]
    lanes,  # [num_adjusted]
    num_prompt,  # [num_adjusted]
    positions,  # [num_rows]
    tables,  # [num_lanes, max_blocks]
    table_stride,
    tokens,  # [num_blocks, BLOCK_SIZE]
    vocab,
    BLOCK_SIZE: tl.constexpr,
    WAS_PROMPTED: tl.constexpr,
    PIECE: tl.constexpr,
):
    number = tl.program_id(0)
    end = tl.load(positions + tl.load(rows + number)) + 1
    table = tables + tl.load(lanes + number).to(tl.int64) * table_stride
    prompted = tl.load(num_prompt + number)
    for begin in range(tl.program_id(1) * PIECE, end, tl.num_programs(1) * PIECE):
        i = begin + tl.arange(0, PIECE)
        is_there = i < end
        block = tl.load(table + i // BLOCK_SIZE, is_there, 0).to(tl.int64)
        token = tl.load(tokens + block * BLOCK_SIZE + i % BLOCK_SIZE, is_there, 0)
        to = counts + number.to(tl.int64) * vocab + token
        tl.atomic_or(to, tl.full([PIECE], WAS_PROMPTED, tl.int32), is_there & (i < prompted))
        tl.atomic_add(to, tl.full([PIECE], 1, tl.int32), is_there & (i >= prompted))


@triton.jit
def _apply(
    logits,  # [num_rows, vocab]
    rows,  # [num_adjusted]
    repetitions,  # [num_adjusted]
    presences,
    frequencies,
    counts,  # [num_adjusted, vocab]
    adjusted,  # [num_adjusted, vocab], written
    vocab,
    WAS_PROMPTED: tl.constexpr,
    PIECE: tl.constexpr,
):
    number = tl.program_id(0)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    is_there = i < vocab
    x = tl.load(logits + tl.load(rows + number) * vocab + i, is_there, 0.0)
    count = tl.load(counts + number.to(tl.int64) * vocab + i, is_there, 0)
    times = tl.where(count >= WAS_PROMPTED, count - WAS_PROMPTED, count)
    repetition = tl.load(repetitions + number)
    x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = tl.where(times > 0, x - (tl.load(presences + number) + tl.load(frequencies + number) * times.to(tl.float32)), x)
    tl.store(adjusted + number.to(tl.int64) * vocab + i, x, is_there)


@triton.jit
def _edit(
    adjusted,  # [num_adjusted, vocab], changed
    begins,  # [num_adjusted + 1]
    tokens,  # [num_edits]
    values,  # [num_edits]
    vocab,
    PIECE: tl.constexpr,
):
    number = tl.program_id(0)
    end = tl.load(begins + number + 1)
    for begin in range(tl.load(begins + number), end, PIECE):
        i = begin + tl.arange(0, PIECE)
        is_there = i < end
        to = adjusted + number.to(tl.int64) * vocab + tl.load(tokens + i, is_there, 0)
        tl.store(to, tl.load(to, is_there, 0.0) + tl.load(values + i, is_there, 0.0), is_there)
