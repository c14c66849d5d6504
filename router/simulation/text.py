"""Texts of which only the lengths and the names of blocks are known. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from splitfire.core.workload_trace import Arrival

SPREAD = 0x9E3779B97F4A7C15  # odd: different numbers stay different


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text of `num_tokens`; its full blocks have names, what follows belongs to it alone."""

    num_tokens: int
    names: tuple[int, ...]


class Text:
    """Makes texts that share exactly what they were made of. Names are as far apart as hashes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._count = 0

    def new(self, num_tokens: int) -> Prompt:
        return self.more(Prompt(0, ()), num_tokens)

    def more(self, before: Prompt, num_tokens: int) -> Prompt:
        """It goes on, in a way of its own."""
        total = before.num_tokens + num_tokens
        return Prompt(total, (*before.names, *self._names(total // self._block_size - len(before.names))))

    def arrival(self, at_s: float, prompt: Prompt, num_output: int) -> Arrival:
        return Arrival(at_s, prompt.num_tokens, num_output, prompt.names)

    def _names(self, count: int) -> Iterable[int]:
        for _ in range(count):
            self._count += 1
            yield self._count * SPREAD & 0xFFFFFFFFFFFFFFFF
