"""A worker that says anything, to an agent and to each of its machines, for FUZZ_S together; `make fuzz` tries new inputs."""

from __future__ import annotations

import pytest

from tests.kvtransfer import fuzz

FUZZ_S = 15.0


@pytest.mark.parametrize(("target", "share"), [("frames", 0.5), ("receiver", 0.25), ("sender", 0.25)])
def test_whatever_a_peer_says_costs_nobody_else_anything(target: str, share: float) -> None:
    """B66, B68, B73, B82, and what nobody thought of. Seeds are always the same here: `make fuzz` draws new ones."""
    assert fuzz.fuzz(target, share * FUZZ_S, first_seed=1) >= fuzz.BATCH
