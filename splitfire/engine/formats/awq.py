"""AWQ (Lin et al. 2023) as AutoAWQ's `gemm` kernels want it: 4 bits, transposed, and in an order of their own.

qweight is [in, out / 8]: a word holds eight columns of one row of the transposed matrix. Its lowest bits are column 0, the next ones
column 2, then 4, 6, 1, 3, 5, 7. Zero points are packed in the same way, [groups, out / 8].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splitfire.core.quant_config import Scheme
from splitfire.engine.formats.scales import QuantisedRows, Scales
from splitfire.engine.formats.stored import FLOATS, Part, StoredMatrix

PER_WORD = 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of its columns is


def parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    num_words = -(-rows // PER_WORD)
    num_groups = scheme.grid.shape(rows, columns)[1]
    return {
        "qweight": Part(((columns, num_words),), ("I32",)),
        "qzeros": Part(((num_groups, num_words),), ("I32",)),
        "scales": Part(((num_groups, rows),), FLOATS),
    }


def open_rows(matrix: StoredMatrix, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantisedRows:
    words = tensors["qweight"]

    def elements(begin: int, end: int) -> Tensor:
        """`begin` is a multiple of PER_WORD (kernels/linear.py row_tiles)."""
        assert begin % PER_WORD == 0
        return _unpack(words[:, begin // PER_WORD : -(-end // PER_WORD)])[: end - begin]

    zeros = _unpack(tensors["qzeros"])[: matrix.rows].float()
    scales = Scales(scheme.grid, tensors["scales"].t().float(), zeros)
    return QuantisedRows((matrix.rows, matrix.columns), elements, scales)


def _unpack(words: Tensor) -> Tensor:
    """[n, words] int32 -> [words * PER_WORD, n] uint8."""
    turned = words.t().contiguous()
    numbers = torch.empty(turned.shape[0], PER_WORD, turned.shape[1], dtype=torch.uint8)
    for column, place in enumerate(PLACES):
        numbers[:, column] = (turned >> (4 * place)) & 15
    return numbers.flatten(0, 1)
