"""Percentiles, gaps, goodput and rows, by hand-made samples and beside numpy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfire.cli.bench.statistics import (
    CURVE,
    Client,
    Outcome,
    PhaseTime,
    distribution,
    gaps_of,
    mean_phases,
    percentile,
    rows_of,
)
from tests.cli.bench.samples import SLO, cell, failed, outcome

times = st.floats(0, 1e4, allow_nan=False)


@given(samples=st.lists(times, min_size=1, max_size=200), share=st.floats(0, 1))
def test_percentiles_are_numpys(samples: list[float], share: float) -> None:
    assert percentile(sorted(samples), share) == pytest.approx(float(np.quantile(samples, share)), rel=1e-9, abs=1e-9)


@given(samples=st.lists(times, min_size=1, max_size=200))
def test_a_distribution_says_what_numpy_says(samples: list[float]) -> None:
    found = distribution(samples)
    assert found is not None
    expected = [np.mean(samples), *np.percentile(samples, [50, 90, 99]), max(samples)]
    assert [found.mean, found.p50, found.p90, found.p99, found.greatest] == pytest.approx(expected)
    assert list(found.curve) == pytest.approx(list(np.quantile(samples, CURVE)))


def test_nothing_has_no_distribution() -> None:
    assert distribution([]) is None


@given(st.lists(st.tuples(st.floats(0.001, 1.0), st.integers(1, 9)), min_size=1, max_size=30))
def test_gaps_are_one_for_each_token_but_the_first_and_add_up_to_the_stream(messages: list[tuple[float, int]]) -> None:
    at, stream = 0.0, []
    for gap, count in messages:
        at += gap
        stream.append((at, count))
    gaps = gaps_of(stream)
    assert len(gaps) == sum(count for _, count in stream) - 1
    assert sum(gaps) == pytest.approx(stream[-1][0] - stream[0][0])


def test_tokens_of_one_message_share_its_gap() -> None:
    assert list(gaps_of([(1.0, 2), (1.3, 3), (1.5, 1)])) == pytest.approx([0.0, 0.1, 0.1, 0.1, 0.2])
    assert not gaps_of([])


def test_goodput_counts_what_met_both_targets() -> None:
    """Targets are 500 ms and 50 ms; at them is in time."""
    outcomes = [
        outcome(0.5, 0.05),  # just in time
        outcome(0.1, 0.01, num_gaps=0),  # one token: nothing between
        outcome(0.501, 0.01),
        outcome(0.1, 0.051),
        replace(outcome(0.1), gaps_s=[0.01, 0.01, 0.01, 0.2]),  # 57.5 ms in the mean
        replace(outcome(0.1), gaps_s=[0.0, 0.0, 0.0, 0.2]),  # 50 ms
        failed("queue_full"),
        replace(outcome(0.1), error="incomplete_stream"),  # fast, and not all of it came
    ]
    [row] = rows_of([cell(outcomes, duration_s=4.0)], SLO)
    assert (row.num_requests, row.num_met, row.num_met_ttft) == (8, 3, 5)
    assert row.goodput == 0.75
    assert row.errors == {"queue_full": 1, "incomplete_stream": 1}
    assert row.share_met == 3 / 8


def test_failed_requests_are_counted_and_in_no_percentile() -> None:
    [row] = rows_of([cell([outcome(0.1), failed("unavailable"), failed("unavailable"), replace(outcome(9.0), error="x")])], SLO)
    assert row.ttft is not None and row.itl is not None
    assert (row.ttft.count, row.ttft.greatest, row.itl.count) == (1, 0.1, 4)
    assert (row.num_requests, row.num_errors) == (4, 3)
    [none] = rows_of([cell([failed("unavailable")])], SLO)
    assert none.ttft is None and none.itl is None and none.goodput == 0


def test_rounds_are_one_row_and_rows_are_by_rate() -> None:
    cells = [
        cell([outcome(0.1)] * 4, "split", 4.0, 0),
        cell([outcome(0.1)] * 2, "split", 2.0, 0),
        cell([outcome(0.9)] * 2, "aggregated", 2.0, 0),
        cell([outcome(0.1)] + [outcome(0.9)] * 3, "split", 4.0, 1),
    ]
    rows = rows_of(cells, SLO)
    assert [(row.rate, row.variant) for row in rows] == [(2.0, "split"), (2.0, "aggregated"), (4.0, "split")]
    last = rows[-1]
    assert (last.num_requests, last.num_met, last.duration_s) == (8, 5, 2.0)
    assert (last.goodput, list(last.goodputs)) == (2.5, [4.0, 1.0])
    assert last.ttft is not None and last.ttft.count == 8


def test_a_run_that_was_cut_counts_with_the_time_it_had() -> None:
    [row] = rows_of([cell([outcome()] * 3, rate=2.0, duration_s=1.5, num_unfinished=4, is_cut=True)], SLO)
    assert (row.goodput, row.num_unfinished, row.is_cut) == (2.0, 4, True)
    assert rows_of([cell([], rate=2.0, duration_s=0.0, is_cut=True)], SLO) == []


def test_tokens_are_counted_until_the_last_one_came() -> None:
    """10 answers of 5 tokens, the last of them 8 s after the measured time of 2 s began at 1 s."""
    outcomes = [outcome(0.1)] * 9 + [outcome(7.9, 0.025, due_s=1.0)]
    [row] = rows_of([cell(outcomes, duration_s=2.0)], SLO)
    assert row.tokens_per_s == pytest.approx(50 / 8.0)
    [quick] = rows_of([cell([outcome(0.1)] * 10, duration_s=2.0)], SLO)
    assert quick.tokens_per_s == pytest.approx(50 / 2.0)


@pytest.mark.parametrize(
    ("late_s", "lag_s", "is_late"), [(0.001, 0.001, False), (0.051, 0.001, True), (0.001, 0.011, True), (0.049, 0.009, False)]
)
def test_a_late_client_says_so(late_s: float, lag_s: float, is_late: bool) -> None:
    """A tenth of the target of 500 ms, a fifth of that of 50 ms."""
    [row] = rows_of([cell([outcome(late_s=late_s)] * 10, client=Client([lag_s] * 10, 0.5))], SLO)
    assert row.is_late is is_late
    assert row.late is not None and row.late.p99 == pytest.approx(late_s)
    assert row.cpu_share == 0.5


def test_cached_tokens_are_a_share_of_the_prompts() -> None:
    [row] = rows_of([cell([replace(outcome(), num_cached=50), outcome()])], SLO)
    assert row.cached_share == 0.25


def test_phases_are_means_over_those_that_tell() -> None:
    told = [
        replace(outcome(), phases=(PhaseTime("admit", 0.1), PhaseTime("prefill", 0.2))),
        replace(outcome(), phases=(PhaseTime("prefill", 0.4), PhaseTime("prefill", 0.2))),
        outcome(),
    ]
    found = mean_phases(told)
    assert [phase.name for phase in found] == ["admit", "prefill"]
    assert [phase.seconds for phase in found] == pytest.approx([0.05, 0.4])
    assert mean_phases([outcome()]) == ()


def test_a_request_without_a_token_is_not_in_time() -> None:
    lost = Outcome(0.0, 0.0, 10, error="deadline_exceeded")
    assert math.isnan(lost.ttft_s) and not lost.has_met(SLO)
