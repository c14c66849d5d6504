"""A step as the bytes that rank 0 sends to the other ranks, and back. Pure but for numpy.

    counts   rows, sequences, logits, blocks of the longest table, decoding sequences: five u32, four zero bytes
    arrays   of StepBatch, in its order, without lanes: int64, then the tables, int32

Only tables of the step's own sequences travel, one below the other, so the lanes on the other side are 0, 1, 2, ...
"""

from __future__ import annotations

import struct

import numpy as np

from splitfire.engine.batch import StepBatch

_COUNTS = struct.Struct("<5I4x")


def encode(batch: StepBatch, block_size: int) -> bytes:
    """block_size: tokens."""
    num_blocks = -(-int(batch.context_lens.max()) // block_size)
    tables = batch.block_tables[batch.lanes, :num_blocks]
    arrays = (batch.token_ids, batch.positions, batch.query_begins, batch.context_lens, batch.logit_rows)
    counts = (len(batch.token_ids), len(batch.context_lens), len(batch.logit_rows), num_blocks, batch.num_decoding)
    return b"".join((_COUNTS.pack(*counts), *(array.tobytes() for array in arrays), tables.tobytes()))


def decode(message: bytearray) -> StepBatch:
    """Its arrays are views of the message."""
    num_rows, num_sequences, num_logits, num_blocks, num_decoding = _COUNTS.unpack_from(message)
    lens = (num_rows, num_rows, num_sequences + 1, num_sequences, num_logits)
    numbers = np.frombuffer(message, np.int64, sum(lens), _COUNTS.size)
    tables = np.frombuffer(message, np.int32, offset=_COUNTS.size + numbers.nbytes).reshape(num_sequences, num_blocks)
    token_ids, positions, query_begins, context_lens, logit_rows = np.split(numbers, np.cumsum(lens[:-1]))
    return StepBatch(token_ids, positions, query_begins, context_lens, np.arange(num_sequences), tables, logit_rows, num_decoding)
