"""The cost table between, beyond and beside what was measured."""

from __future__ import annotations

import pytest

from splitfire.engine.speculation.costs import MAX_EXTRA_ROWS, REFRESH, CostPoint, StepCosts

POINTS = [CostPoint(1, 1, 1.0), CostPoint(1, 9, 2.0), CostPoint(1, 17, 4.0), CostPoint(5, 5, 3.0), CostPoint(5, 13, 7.0)]


def test_between_points_it_is_linear_and_beyond_it_goes_on() -> None:
    costs = StepCosts(POINTS)
    assert [costs.added(1)[rows] for rows in (0, 4, 8, 12, 16, 24)] == pytest.approx([0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
    assert [costs.plain(n) for n in (1, 3, 5)] == pytest.approx([1.0, 2.0, 3.0])
    assert costs.plain(9) == pytest.approx(5.0)
    assert costs.added(3)[8] == pytest.approx((1.0 + 4.0) / 2), "half way between one sequence and five"
    assert costs.added(99)[8] == pytest.approx(4.0)


def test_noise_never_makes_more_rows_cheaper() -> None:
    costs = StepCosts([CostPoint(1, 1, 2.0), CostPoint(1, 2, 1.5), CostPoint(1, 4, 1.0), CostPoint(1, 8, 3.0)])
    added = costs.added(1)
    assert len(added) == MAX_EXTRA_ROWS + 1 and added == sorted(added) and added[0] == 0.0


def test_one_point_is_enough_and_none_is_not() -> None:
    costs = StepCosts([CostPoint(1, 1, 0.5)])
    assert costs.plain(64) == 0.5
    assert costs.added(64)[200] == 0.0
    with pytest.raises(ValueError, match="points"):
        StepCosts([])


def test_a_machine_that_gets_slower_is_noticed_in_everything() -> None:
    costs = StepCosts(POINTS, [CostPoint(1, 1, 0.1), CostPoint(9, 9, 0.9)])
    before = costs.draft(5)
    for _ in range(100):
        costs.observe(1, 0, 3.0)
    assert costs.ratio == pytest.approx(3.0, rel=0.01)
    assert (costs.plain(5), costs.added(1)[8], costs.draft(5)) == (3.0, 1.0, before), "the ratio is the same on both sides"


def test_rows_that_cost_more_than_measured_are_noticed_where_they_do() -> None:
    costs = StepCosts(POINTS)
    for _ in range(6 * REFRESH):
        costs.observe(1, 0, 1.0)
        costs.observe(1, 8, 1.0 + 3 * 1.0)
    assert 2.0 < costs.added(1)[8] < 4.0
    assert costs.added(1)[2] == pytest.approx(0.25, rel=0.05)
    assert costs.added(1) == sorted(costs.added(1))


def test_a_wild_measurement_moves_little() -> None:
    costs = StepCosts(POINTS)
    costs.observe(1, 0, 1e6)
    assert costs.ratio < 1.3
    costs.observe(1, 300, 0.0)
    assert 0.8 < costs.ratio < 1.3
