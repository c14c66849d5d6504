"""Two hundred fleets that fall apart, each in its own way: every promise holds in each of them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.sim.campaign import replay

NUM_SEEDS = 200
PER_TEST = 25


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, PER_TEST))
def test_every_promise_in_every_misfortune(first: int) -> None:
    """F01 to F09, F14, F15, F25, F31 to F34, F37, F46, F52, F59, F60, F77 in any mixture."""
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + PER_TEST):
        for asked in replay(seed):
            outcomes["cancelled" if asked.task.cancelled() else "failed" if asked.error is not None else "complete"] += 1
    assert outcomes["complete"] > outcomes.total() / 2, outcomes  # or nothing much was tried
