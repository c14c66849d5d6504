"""Who takes part in a comparison, and what becomes of those that cannot go on."""

from __future__ import annotations

from typing import cast

import pytest

from benchmarks.opponents.server import Server
from benchmarks.serve.contestants import Contestant, Lineup
from benchmarks.serve.endpoints import HttpEndpoint

ENDPOINT = HttpEndpoint(1, "nobody")


class FakeServer:
    """Never stopped, never ended."""

    def resume(self) -> None: ...

    def pause(self) -> None: ...


def lineup(*contestants: Contestant) -> Lineup:
    made = Lineup("model", [])
    made.contestants += contestants
    return made


def take(contestant: Contestant, turn: int) -> int:
    if contestant.name == "frail" and turn == 1:
        raise RuntimeError("no token after 120 s")
    return turn


def test_an_opponent_that_fails_takes_no_further_part() -> None:
    frail = Contestant("frail", "they", ENDPOINT, (0,), cast(Server, FakeServer()))
    steady = Contestant("steady", "they", ENDPOINT, (0,), cast(Server, FakeServer()))
    found = lineup(ours := Contestant("ours", "us", ENDPOINT, (0,)), frail, steady)
    with found:
        assert found.measure(turns=2, warmup=1, take=take) == {"ours": [1, 2], "steady": [1, 2]}
        assert found.contestants == [ours, steady]
        assert found.series({"ours": [1], "steady": [2]}, float)[1].name == "steady"
    assert [row.metric for row in found.skipped] == ["skipped: RuntimeError: no token after 120 s"]


def test_a_comparison_without_ours_is_none() -> None:
    with lineup(Contestant("frail", "us", ENDPOINT, (0,))) as found, pytest.raises(RuntimeError):
        found.measure(turns=2, warmup=0, take=take)
