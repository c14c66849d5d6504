"""Numbers as people read them: three digits that mean something, and a unit. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def three(value: float) -> str:
    """1234, 123, 12.3, 1.23, 0.123; never an exponent."""
    if value == 0 or math.isnan(value):
        return "0" if value == 0 else "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def milliseconds(value_s: float) -> str:
    """Without its unit."""
    return three(value_s * 1e3)


def seconds(value_s: float) -> str:
    """`12.3 ms`, `1.20 s`."""
    if math.isnan(value_s):
        return "-"
    return f"{three(value_s)} s" if value_s >= 1 else f"{three(value_s * 1e3)} ms"


def exact(value_s: float) -> str:
    """Of what somebody chose: `50 ms`, `1.5 s`."""
    return f"{value_s:g} s" if value_s >= 1 else f"{value_s * 1e3:g} ms"


def per_second(value: float) -> str:
    return f"{three(value)}/s"


def sent(rate: float) -> str:
    return f"{rate:g} request{'s' if rate != 1 else ''}/s"


def rate_list(rates: Sequence[float]) -> str:
    """`1`, `1 and 2`, `1, 2 and 4`."""
    words = [f"{rate:g}" for rate in rates]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def count_of(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
