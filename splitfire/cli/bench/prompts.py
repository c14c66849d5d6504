"""The tokens of a run's prompts. Pure.

Contents are drawn from `salt`, which is new in each run of the command: no cache remembers them from the run before. Their number and their
instants come from the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from splitfire.cli.bench.arrivals import Planned

FIRST_ORDINARY_ID = 16  # ids below are special in most tokenizers


class Prompts:
    """Of one run. `cell` keeps them apart from those at other rates and in other rounds; only the shared prefix is the same there."""

    def __init__(self, vocab_size: int, salt: str, cell: str, shared_prefix: int = 0) -> None:
        self._ids = range(min(FIRST_ORDINARY_ID, vocab_size - 1), vocab_size)
        self._salt = f"{salt} {cell}"
        self._shared = Random(f"{salt} shared").choices(self._ids, k=shared_prefix)
        self._blocks: dict[str, list[int]] = {}

    def ids(self, number: int, request: Planned) -> Sequence[int]:
        """Of request `number` of the run."""
        found = list(self._shared)
        for name in request.names:
            if name not in self._blocks:
                self._blocks[name] = Random(f"{self._salt} block {name}").choices(self._ids, k=request.block_size)
            found += self._blocks[name]
        own = Random(f"{self._salt} own {number}").choices(self._ids, k=max(0, request.num_prompt - len(found)))
        return [*found, *own][: request.num_prompt]
