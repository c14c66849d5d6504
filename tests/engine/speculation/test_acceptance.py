"""Shares of what came true are learnt from every token, and say how far a draft will get."""

from __future__ import annotations

import random

import pytest

from splitfire.engine.speculation.acceptance import Acceptance, Shares


def teach(acceptance: Acceptance, chance: float, num_tokens: int, draw: random.Random) -> None:
    evidence = 0
    for _ in range(num_tokens):
        if draw.random() < chance:
            acceptance.came_true(evidence)
            evidence += 1
        else:
            acceptance.missed(evidence)
            evidence = 0


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9, 0.97])
def test_survival_is_what_was_seen(chance: float) -> None:
    shares, draw = Shares(), random.Random(1)
    for _ in range(20):
        acceptance = Acceptance(shares)
        teach(acceptance, chance, 400, draw)
    survival = acceptance.survival(0, 8, 0.0)
    for i, said in enumerate(survival):
        assert said == pytest.approx(chance ** (i + 1), abs=0.12)
    assert sorted(survival, reverse=True) == survival


def test_one_that_is_always_wrong_is_told_from_many_that_are_right_within_five_tokens() -> None:
    shares, draw = Shares(), random.Random(2)
    for _ in range(20):
        teach(Acceptance(shares), 0.95, 200, draw)
    mine = Acceptance(shares)
    assert mine.survival(0, 1, 0.0)[0] > 0.8
    teach(mine, 0.0, 5, draw)
    assert mine.survival(0, 1, 0.0)[0] < 0.35


def test_one_that_is_right_is_told_from_many_that_are_wrong_within_a_line() -> None:
    shares, draw = Shares(), random.Random(2)
    for _ in range(20):
        teach(Acceptance(shares), 0.05, 200, draw)
    mine = Acceptance(shares)
    for evidence in range(20):
        mine.came_true(evidence)
    assert mine.survival(20, 4, 0.0)[3] > 0.7


def test_what_changes_is_noticed() -> None:
    shares, draw = Shares(), random.Random(3)
    acceptance = Acceptance(shares)
    teach(acceptance, 0.98, 600, draw)
    assert acceptance.survival(4, 1, 0.0)[0] > 0.9
    teach(acceptance, 0.0, 30, draw)
    assert acceptance.survival(0, 1, 0.0)[0] < 0.2


def test_survival_ends_where_it_is_not_worth_looking_at() -> None:
    acceptance = Acceptance(Shares())
    assert len(acceptance.survival(40, 500, 0.5)) < 30
    assert all(chance >= 0.5 for chance in acceptance.survival(40, 500, 0.5))
    assert acceptance.survival(0, 5, 0.999) == []


def test_a_run_is_learnt_as_its_tokens_one_by_one() -> None:
    at_once, singly = Acceptance(Shares()), Acceptance(Shares())
    for evidence, count in ((0, 10), (3, 60), (0, 2), (40, 3)):
        at_once.came_true(evidence, count)
        for i in range(count):
            singly.came_true(evidence + i)
        for acceptance in (at_once, singly):
            acceptance.missed(evidence + count)
    for evidence in (0, 5, 40):
        assert at_once.survival(evidence, 4, 0.0) == pytest.approx(singly.survival(evidence, 4, 0.0), abs=0.06)
    at_once.came_true(5, 0)
