"""A worker without a model: what it has cached, and how long it says to compute. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of a fake engine; 0 is at once. Prompts are computed one after another, sequences step together."""

    prompt_s: float = 0.0
    token_s: float = 0.0  # of a prompt token that is not cached
    step_s: float = 0.0
    tokens_per_step: int = 1
    cached_blocks: int = 0  # 0: no prefix cache

    def prefill_s(self, num_uncached: int) -> float:
        return self.prompt_s + self.token_s * num_uncached


INSTANT = Speed()


@dataclass(frozen=True, slots=True)
class Change:
    """Names that came into the cache and that went out of it, in this order."""

    stored: tuple[int, ...]
    removed: tuple[int, ...]


class PrefixCache:
    """At most `num_blocks` blocks; the least recently used goes first, of one prompt the last block before the first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def depth(self, names: Sequence[int]) -> int:
        """How many leading blocks are here."""
        found = 0
        while found < len(names) and names[found] in self._blocks:
            found += 1
        return found

    def add(self, names: Sequence[int]) -> Change:
        """The blocks of a prompt that was just computed."""
        stored = [name for name in names if name not in self._blocks]
        for name in reversed(names):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        removed = []
        while len(self._blocks) > self._num_blocks:
            removed.append(self._blocks.popitem(last=False)[0])
        gone = set(removed)
        return Change(tuple(name for name in stored if name not in gone), tuple(removed))
