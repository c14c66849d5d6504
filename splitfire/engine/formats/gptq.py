"""GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it: 4 or 8 bits, transposed, packed along the inputs.

qweight is [in * bits / 32, out], qzeros [groups, out * bits / 32], lowest bits first. `g_idx` [in] names each input's group; with
`desc_act` groups are of inputs that are not neighbours. Version 1 stores zero points less one, in as many bits: 0 is stored as all ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from splitfire.core.quant_config import Scheme
from splitfire.engine.formats.scales import QuantisedRows, Scales, read_order, unpack_words
from splitfire.engine.formats.stored import FLOATS, Part, StoredMatrix


def parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    per_word = 32 // scheme.bits
    num_groups = scheme.grid.shape(rows, columns)[1]
    return {
        "qweight": Part(((-(-columns // per_word), rows),), ("I32",)),
        "qzeros": Part(((num_groups, -(-rows // per_word)),), ("I32",)),
        "scales": Part(((num_groups, rows),), FLOATS),
        "g_idx": Part(((columns,),), ("I32", "I64"), scheme.is_reordered),
    }


def open_rows(matrix: StoredMatrix, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantisedRows:
    words, index = tensors["qweight"], tensors.get("g_idx")

    def elements(begin: int, end: int) -> Tensor:
        return unpack_words(words[:, begin:end].t(), scheme.bits)[:, : matrix.columns]

    factors = tensors["scales"].t().float()
    zeros = unpack_words(tensors["qzeros"], scheme.bits)[:, : matrix.rows] + scheme.zero_offset
    zeros &= (1 << scheme.bits) - 1
    order = None if index is None else read_order(matrix, "g_idx", index, factors.shape[1])
    return QuantisedRows((matrix.rows, matrix.columns), elements, Scales(scheme.grid, factors, zeros.t().float(), order))
