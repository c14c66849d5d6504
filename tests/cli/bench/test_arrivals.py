"""Plans of requests: so many as asked for, at random instants, the same for the same seed."""

from __future__ import annotations

import statistics
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.cli.bench.arrivals import Planned, Shape, Window, fit, instants, mean_rate, next_rate, plan_poisson, plan_trace
from splitfire.cli.bench.flags import Lengths
from splitfire.cli.bench.prompts import FIRST_ORDINARY_ID, Prompts
from splitfire.core.workload_trace import Arrival, Trace

SHAPE = Shape(Lengths(10, 20), Lengths(3, 5))
TRACE = Trace("t", 4, [Arrival(0.0, 10, 2, (7, 8)), Arrival(1.0, 9, 2, (7, 9)), Arrival(4.0, 3, 5, ())])


@given(seed=st.integers(0, 1000), rate=st.floats(0.1, 200), warmup=st.floats(0, 3), duration=st.floats(0.1, 20))
@settings(deadline=None)
def test_as_many_come_as_the_rate_says_in_order_and_within_their_time(
    seed: int, rate: float, warmup: float, duration: float
) -> None:
    window = Window(warmup, duration)
    planned = plan_poisson(seed, rate, 0, window, SHAPE)
    measured = [request for request in planned if request.is_measured]
    assert len(measured) == max(1, round(rate * (window.end_s - window.warmup_s)))
    assert [request.at_s for request in planned] == sorted(request.at_s for request in planned)
    assert all(warmup <= request.at_s <= window.end_s for request in measured)
    assert all(request.at_s <= warmup for request in planned if not request.is_measured)
    assert all(10 <= request.num_prompt <= 20 and 3 <= request.num_output <= 5 for request in planned)
    assert planned == plan_poisson(seed, rate, 0, window, SHAPE)


def test_gaps_are_those_of_a_poisson_process() -> None:
    """Exponential: the mean is one over the rate, and so is the standard deviation; a share of 1/e is longer than the mean."""
    times = instants(Random(1), 50.0, 0.0, 400.0)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.01)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.01)


def test_other_seeds_rates_and_rounds_are_other_arrivals() -> None:
    window = Window(0, 10)
    plans = [plan_poisson(seed, 4, turn, window, SHAPE) for seed, turn in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(plan) for plan in plans}) == 3


def test_a_trace_is_played_at_the_rate_asked_for() -> None:
    assert mean_rate(TRACE) == 0.5
    planned = plan_trace(TRACE, 1.0, Window(0.25, 29.75))
    assert [request.at_s for request in planned[:3]] == [0.0, 0.5, 2.0]
    assert [request.is_measured for request in planned[:3]] == [False, True, True]
    assert len([request for request in planned if request.is_measured]) == 29


def test_a_trace_that_is_over_begins_again_with_other_blocks() -> None:
    planned = plan_trace(TRACE, 0.5, Window(0, 8.0))
    again = planned[3]
    assert again.at_s == 4.0 + 1 / 0.5
    assert not set(again.names) & set(planned[0].names)


def test_a_trace_without_time_is_a_seconds() -> None:
    planned = plan_trace(Trace("t", 4, [Arrival(0.0, 10, 2, ())] * 3), 6.0, Window(0, 1.0))
    assert [request.at_s for request in planned] == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]


def test_requests_are_cut_to_what_the_model_takes() -> None:
    long = [Planned(0, 90, 20, True), Planned(0, 100, 20, True), Planned(0, 10, 80, True)]
    fitted, num_cut = fit(long, 100)
    assert [(request.num_prompt, request.num_output) for request in fitted] == [(80, 20), (80, 20), (10, 50)]
    assert num_cut == 3
    assert fit([Planned(0, 80, 20, True)], 100) == ([Planned(0, 80, 20, True)], 0)


@pytest.mark.parametrize(
    ("seen", "after"),
    [
        ([], 1),
        ([(1, 1.0)], 2),
        ([(1, 1.0), (2, 2.0)], 4),
        ([(1, 1.0), (2, 2.0), (4, 1.95)], 8),  # hardly less: noise
        ([(1, 1.0), (2, 2.0), (4, 1.5)], None),
        ([(1, 0.0)], 0.5),  # too slow for one a second
        ([(1, 0.0), (0.5, 0.4)], None),
        ([(1, 0.0), (0.5, 0.0), (0.25, 0.0), (0.125, 0.0), (0.0625, 0.0)], None),
    ],
)
def test_auto_doubles_until_goodput_falls(seen: list[tuple[float, float]], after: float | None) -> None:
    assert next_rate(seen) == after


def test_prompts_have_their_lengths_share_what_they_should_and_nothing_else() -> None:
    prompts = Prompts(1000, "salt", "cell", shared_prefix=6)
    one, other = (prompts.ids(number, Planned(0, 20, 1, True)) for number in (0, 1))
    assert len(one) == len(other) == 20
    assert one[:6] == other[:6] and one[6:] != other[6:]
    assert min(one) >= FIRST_ORDINARY_ID and max(one) < 1000
    assert Prompts(1000, "salt", "another cell", 6).ids(0, Planned(0, 20, 1, True))[:6] == one[:6]
    assert Prompts(1000, "salt", "another cell", 6).ids(0, Planned(0, 20, 1, True))[6:] != one[6:]
    assert Prompts(1000, "another run", "cell", 6).ids(0, Planned(0, 20, 1, True))[:6] != one[:6]


def test_prompts_of_a_trace_begin_alike_where_their_blocks_do() -> None:
    prompts = Prompts(1000, "salt", "cell")
    planned = plan_trace(TRACE, 0.5, Window(0, 5.0))
    one, two, three = (prompts.ids(number, request) for number, request in enumerate(planned))
    assert (len(one), len(two), len(three)) == (10, 9, 3)
    assert one[:4] == two[:4] and one[4:8] != two[4:8]


def test_a_tiny_vocabulary_has_prompts_too() -> None:
    assert Prompts(2, "salt", "cell").ids(0, Planned(0, 3, 1, True)) == [1, 1, 1]
