"""How fast the queue drains: only what starts while somebody waits tells it."""

from __future__ import annotations

from math import inf

import pytest

from router.drain_rate import KNOWN_FOR_S, DrainRate


def drained(rate: DrainRate, begin: float, seconds: float, tokens_per_s: float) -> float:
    """A start every tenth of a second, while others wait."""
    now = begin
    while now < begin + seconds:
        rate.look(now, is_waiting=True)
        now += 0.1
        rate.started(round(tokens_per_s / 10))
    rate.look(now, is_waiting=True)
    return now


def test_it_is_what_starts_in_a_second() -> None:
    rate = DrainRate()
    drained(rate, 0.0, 10.0, 1000.0)
    assert rate.tokens_per_s == pytest.approx(1000.0, rel=0.05)
    drained(rate, 10.0, 10.0, 200.0)
    assert rate.tokens_per_s == pytest.approx(200.0, rel=0.3)


def test_what_starts_while_nobody_waits_says_nothing() -> None:
    rate = DrainRate()
    for i in range(100):
        rate.started(1)
        rate.look(i / 10, is_waiting=False)
    assert rate.tokens_per_s == inf


def test_one_long_prompt_under_way_is_no_standstill() -> None:
    rate = DrainRate()
    rate.look(0.0, is_waiting=True)
    rate.started(8000)
    rate.look(5.0, is_waiting=True)
    assert rate.tokens_per_s == inf
    rate.look(10.5, is_waiting=True)
    assert rate.tokens_per_s == pytest.approx(8000 / 10.5)


def test_it_is_remembered_for_a_minute() -> None:
    rate = DrainRate()
    now = drained(rate, 0.0, 6.0, 1000.0)
    rate.look(now + KNOWN_FOR_S - 1.0, is_waiting=False)
    assert rate.tokens_per_s < inf
    rate.look(now + KNOWN_FOR_S + 1.0, is_waiting=False)
    assert rate.tokens_per_s == inf
