"""A step as contiguous arrays: what a model, on whatever device and in whatever language, has to know of it. Pure but for numpy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitfire.engine.lanes import NOBODY, Ints
from splitfire.engine.scheduler import Slice, Step


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows are the tokens that get KV in this step, one sequence after the other: first those that decode, a row each, then
    the others. Valid until the next schedule: tables are the engine's own, and change with it."""

    token_ids: Ints  # [num_rows]; NOBODY where the step in flight decides
    positions: Ints  # [num_rows] of each token in its sequence
    query_begins: Ints  # [num_sequences + 1]: rows [query_begins[i], query_begins[i + 1]) are of sequence i
    context_lens: Ints  # [num_sequences] tokens to attend to, those of this step included
    lanes: Ints  # [num_sequences]: the blocks of sequence i are block_tables[lanes[i], : ceil(context_lens[i] / block_size)]
    block_tables: NDArray[np.int32]  # [num_lanes, max_blocks], C-contiguous
    logit_rows: Ints  # [num_logits] rows whose logits are wanted, in order
    num_decoding: int  # leading sequences (and rows, and logit rows) that decode, a row each


def batch_of(step: Step) -> StepBatch:
    """The arrays of a step. Those of sequences that decode are read from their lanes as a whole."""
    columns, lanes = step.lanes, step.decoding.lanes
    num_decoding = len(lanes)
    num_tokens, newest = columns.num_tokens[lanes], columns.newest[lanes]
    if columns.num_flights:
        pending = columns.num_in_flight[lanes]
        num_tokens, newest = num_tokens + pending, np.where(pending > 0, NOBODY, newest)
    begins = np.arange(num_decoding + 1)
    if not step.slices:
        return StepBatch(newest, num_tokens - 1, begins, num_tokens, lanes, columns.block_tables, begins[:-1], num_decoding)
    pieces = step.slices
    lens = np.array([piece.num_rows for piece in pieces])
    ends = num_decoding + lens.cumsum()
    return StepBatch(
        np.concatenate((newest, *(_token_ids(piece) for piece in pieces))),
        np.concatenate((num_tokens - 1, *(np.arange(piece.begin, piece.begin + piece.num_rows) for piece in pieces))),
        np.concatenate((begins, ends)),
        np.concatenate((num_tokens, np.array([piece.begin + piece.num_rows for piece in pieces]))),
        np.concatenate((lanes, np.array([piece.sequence.lane for piece in pieces]))),
        columns.block_tables,
        np.concatenate((begins[:-1], *_logit_rows(pieces, ends))),
        num_decoding,
    )


def _token_ids(piece: Slice) -> Ints:
    return np.array([*piece.sequence.tokens[piece.begin : piece.end], *piece.drafts])


def _logit_rows(pieces: Seq[Slice], ends: Ints) -> list[Ints]:
    """Of each piece that reaches its sequence's end: the last token's, and those of its drafts."""
    return [np.arange(end - 1 - len(piece.drafts), end) for piece, end in zip(pieces, ends.tolist(), strict=True) if piece.samples]
