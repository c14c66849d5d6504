"""What is said of the rows, and that chance is not told as a difference."""

from __future__ import annotations

from dataclasses import replace

from splitfire.cli.bench.numbers import exact, milliseconds, rate_list, seconds, sent, three
from splitfire.cli.bench.statistics import Cell, Outcome, rows_of
from splitfire.cli.bench.verdict import carried_rate, comparison, error_lines, sentences, warnings
from tests.cli.bench.samples import SLO, cell, failed, outcome


def cells(split: list[Outcome], aggregated: list[Outcome], rate: float = 4.0, rounds: int = 2) -> list[Cell]:
    return [
        cell(outcomes, name, rate, turn)
        for turn in range(rounds)
        for name, outcomes in (("split", split), ("aggregated", aggregated))
    ]


def said(found: list[Cell]) -> str:
    return comparison(rows_of(found, SLO))


def test_where_split_wins_and_loses_is_one_sentence_of_numbers() -> None:
    found = cells([outcome(0.2, 0.01)] * 30, [outcome(0.1, 0.04)] * 30)
    assert said(found) == (
        "Split wins in ITL p99 at 4 requests/s (10.0 ms against 40.0 ms); it loses in TTFT p90 at 4 requests/s (200 ms against 100 ms)."
    )


def test_rates_are_told_as_briefly_as_can_be() -> None:
    fast, slow = [outcome(0.1)] * 30, [outcome(0.3)] * 30
    low, high = cells(fast, slow, 1.0), cells(fast, slow, 4.0)
    assert "TTFT p90 at every rate (100 ms against 300 ms, at 1)" in said([*low, *high])
    assert "TTFT p90 from 2 requests/s on" in said([*cells(fast, fast, 1.0), *cells(fast, slow, 2.0), *high])
    assert "TTFT p90 up to 2 requests/s" in said([*low, *cells(fast, slow, 2.0), *cells(fast, fast, 4.0)])
    assert "TTFT p90 at 1 and 4 requests/s" in said([*low, *cells(fast, fast, 2.0), *high])
    assert "TTFT p90 at 1 request/s (100" in said([*low, *cells(fast, fast, 2.0)])


def test_chance_is_not_told_as_a_difference() -> None:
    """Three of thirty more in time; p90 that swap places between rounds; a tenth less; too few requests."""
    nothing = "Split and aggregated differ by no more than chance, at 4 requests/s."
    assert said(cells([outcome(0.49)] * 27 + [outcome(0.51)] * 3, [outcome(0.49)] * 24 + [outcome(0.51)] * 6)) == nothing
    swapped = [
        *cells([outcome(0.1)] * 30, [outcome(0.3)] * 30, rounds=1),
        *cells([outcome(0.4)] * 30, [outcome(0.1)] * 30, rounds=1),
    ]
    assert said(swapped) == nothing
    good, bad = [outcome(0.49)] * 60, [outcome(0.51)] * 60
    unsteady = [*cells(good, good[:30] + bad[:30], rounds=1), *cells(good[:30] + bad[:30], bad, rounds=1)]
    assert said(unsteady) == nothing, "far more in time, and yet its worst round was no better than the other's best"
    assert said(cells([outcome(0.1)] * 30, [outcome(0.105)] * 30)) == nothing
    assert said(cells([outcome(0.1)] * 5, [outcome(0.3)] * 5)) == nothing


def test_more_goodput_is_told() -> None:
    found = cells([outcome(0.1)] * 60, [outcome(0.1)] * 30 + [outcome(0.6)] * 30)
    assert "Split wins in goodput at 4 requests/s (4.00/s against 2.00/s)" in said(found)
    half = [*cells([outcome(0.6)] * 60, [outcome(0.1)] * 60)]
    assert "it loses in goodput at 4 requests/s (0/s against 4.00/s)" in said(half)


def test_who_refuses_many_wins_no_percentile() -> None:
    """The fifth that would have waited longest: what is left of the others' times is no shorter."""
    honest, refusing = [outcome(0.1)] * 32 + [outcome(0.9)] * 8, [outcome(0.1)] * 32 + [failed("queue_full")] * 8
    assert "TTFT" not in said(cells(honest, refusing))
    assert "it loses in goodput at 4 requests/s (3.20/s against 4.00/s) and in TTFT p90" in said(cells(honest, [outcome(0.1)] * 40))


def test_only_rates_of_both_are_compared() -> None:
    whole, cut = cell([outcome()] * 30, "split", 1.0), cell([outcome(0.3)] * 30, "aggregated", 1.0, is_cut=True)
    assert said([whole, cut]) == ""
    assert said([cell([outcome()] * 30, "split", 1.0), cell([outcome()] * 30, "aggregated", 2.0)]) == ""
    assert said([cell([outcome()] * 30, "127.0.0.1:7070", 1.0)]) == ""


def test_what_a_fleet_carries_ends_where_it_first_fails() -> None:
    good, bad = [outcome(0.1)] * 20, [outcome(0.6)] * 20
    rows = rows_of([cell(good, rate=1.0), cell(good, rate=2.0), cell(bad, rate=4.0), cell(good, rate=8.0)], SLO)
    assert carried_rate(rows) == 2.0
    assert carried_rate(rows[2:]) is None
    assert sentences(rows) == [
        "Split: 90% or more of the requests in time up to 2 requests/s; most in time at 8 requests/s: 8.00/s."
    ]
    assert "up to 2 requests/s or more;" in sentences(rows[:2])[0]
    assert sentences(rows[2:3]) == ["Split: no request met both targets at any rate."]
    assert "under 90% in time at every rate" in sentences(rows[2:])[0]


def test_warnings_name_where_not_to_believe() -> None:
    fine = cell([outcome()] * 20, rate=1.0)
    assert warnings(rows_of([fine], SLO)) == []
    late = cell([outcome(late_s=0.2)] * 20, rate=2.0)
    wrong = cell([outcome(), failed("queue_full")], "aggregated", 4.0)
    cut = replace(cell([outcome()], rate=8.0), is_cut=True)
    found = warnings(rows_of([fine, late, wrong, cut], SLO))
    assert len(found) == 3
    assert "late in 1 of 4 lines (split at 2): its own" in found[0]
    assert warnings(rows_of([late, replace(late, rate=4.0)], SLO))[0].startswith("The client was late everywhere: ")
    assert "(aggregated at 4)" in found[1]
    assert "split at 8 counts as far as it went" in found[2]
    assert error_lines(rows_of([wrong], SLO)) == ["aggregated at 4: 1 queue_full"]


def test_numbers_have_three_digits() -> None:
    assert [three(value) for value in (0, 1234.5, 123.45, 12.345, 1.2345, 0.12345, 0.0012345, float("nan"))] == (
        ["0", "1234", "123", "12.3", "1.23", "0.123", "0.00123", "-"]
    )
    assert [seconds(0.01234), seconds(1.5), milliseconds(0.5)] == ["12.3 ms", "1.50 s", "500"]
    assert [exact(0.05), exact(1.5)] == ["50 ms", "1.5 s"]
    assert [sent(1), sent(0.5), rate_list([1]), rate_list([1, 2]), rate_list([1, 2.5, 4])] == (
        ["1 request/s", "0.5 requests/s", "1", "1 and 2", "1, 2.5 and 4"]
    )
