"""After many transfers, of which three in ten are aborted by either end at any moment, nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvtransfer.transport import Transport
from tests.kvtransfer import leaks

COUNT = 1_500  # `make leak-check` runs 10 000
MAX_GROWTH_BYTES = 4 << 20  # of resident memory, which goes up and down by one


@pytest.mark.parametrize("make", [leaks.memory, leaks.tcp, leaks.ucx])
def test_aborts_at_any_moment_leak_no_slot_no_block_and_no_memory(make: Callable[[], tuple[Transport, Transport]]) -> None:
    churn, warm, end = asyncio.run(leaks.run(make, COUNT, seed=1))
    assert churn.ends["aborted"] > 0.2 * COUNT
    leaks.assert_nothing_stayed(churn, warm, end, MAX_GROWTH_BYTES)
