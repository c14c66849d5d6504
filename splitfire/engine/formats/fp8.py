"""Matrices of float8_e4m3 elements: compressed-tensors' `float-quantized`, transformers' and DeepSeek's `fp8`, `fbgemm_fp8`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from splitfire.core.quant_config import Scheme
from splitfire.engine.formats.scales import QuantisedRows, Scales
from splitfire.engine.formats.stored import Part, StoredMatrix, scale_part


def parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    return {
        "weight": Part(((rows, columns),), ("F8_E4M3",)),
        scheme.scale_name: scale_part(scheme.grid, rows, columns),
    }


def open_rows(matrix: StoredMatrix, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantisedRows:
    weight = tensors["weight"]
    factors = tensors[scheme.scale_name].float().view(scheme.grid.shape(matrix.rows, matrix.columns))
    return QuantisedRows((matrix.rows, matrix.columns), lambda begin, end: weight[begin:end], Scales(scheme.grid, factors))
