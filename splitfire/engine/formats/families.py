"""The table of families: what a scheme's layout is called, and which file reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from splitfire.core.quant_config import Layout, Scheme
from splitfire.engine.formats import awq, fp8, gptq, integers
from splitfire.engine.formats.scales import QuantisedRows
from splitfire.engine.formats.stored import Part, StoredMatrix


@dataclass(frozen=True, slots=True)
class Family:
    """`parts` of a matrix [rows, columns] by the last word of their names; `open_rows` reads them once they are checked."""

    parts: Callable[[Scheme, int, int], dict[str, Part]]
    open_rows: Callable[[StoredMatrix, Scheme, Mapping[str, Tensor]], QuantisedRows]


FAMILIES: dict[Layout, Family] = {
    "fp8": Family(fp8.parts, fp8.open_rows),
    "int8": Family(integers.int8_parts, integers.open_int8_rows),
    "packed": Family(integers.packed_parts, integers.open_packed_rows),
    "awq": Family(awq.parts, awq.open_rows),
    "gptq": Family(gptq.parts, gptq.open_rows),
}
