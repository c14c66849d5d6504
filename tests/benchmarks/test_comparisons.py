"""Rows must not flatter: ratios point the right way, and a target is held against the strongest opponent it speaks of."""

from __future__ import annotations

import pytest

from benchmarks.serve.answers import Answer, itl_p99_ms, percentile, single_stream_rate
from benchmarks.serve.comparisons import BEST, RATE, TTFT, Series, Target, compare

OURS = Series("ours", "Splitfire", (100.0, 120.0, 110.0))
SLOW = Series("vLLM float32", "vLLM", (50.0, 50.0, 50.0))
FAST = Series("vLLM bfloat16", "vLLM", (80.0, 79.0, 81.0))
OTHER = Series("OpenVINO", "OpenVINO GenAI", (100.0, 100.0, 100.0))


def test_a_target_of_a_family_is_held_against_its_best_member_of_rates() -> None:
    slow, fast, other = compare("W1", RATE, [OURS, SLOW, FAST, OTHER], {"vLLM": Target("at least 1.8x", 1.8)})
    assert (slow.target, slow.met) == ("", None)  # 2.2x the slow one would have met it
    assert (fast.target, fast.met) == ("at least 1.8x", False)
    assert fast.ratio == pytest.approx(110 / 80)
    assert other.met is None


def test_a_target_of_a_family_is_held_against_its_best_member_of_times() -> None:
    slow, fast = compare("W3", TTFT, [OURS, FAST, SLOW], {"vLLM": Target("at most 1.0x", 1.0)})[::-1]
    assert slow.opponent == 50.0 and slow.met is False  # of times the smaller one is the better opponent
    assert fast.met is None
    assert slow.ratio == pytest.approx(50 / 110)


def test_the_best_of_all_is_one_opponent() -> None:
    rows = compare("W2", RATE, [OURS, SLOW, FAST, OTHER], {BEST: Target("at least 1.3x", 1.3)})
    assert [row.met for row in rows] == [None, None, False]


def test_a_variant_is_no_opponent_of_ours() -> None:
    variant = Series("Splitfire --weights=int8, cores 0,1", "Splitfire", (150.0, 150.0, 150.0))
    targets = {BEST: Target("at least 1x", 1.0)}
    first, beside_ours, beside_best = compare(
        "W1", RATE, [OURS, variant, OTHER], targets, {"--weights=int8": Target("at least 1.3x", 1.3)}
    )
    assert first.opponent_name == "OpenVINO" and first.met is True
    assert (beside_ours.ours, beside_ours.opponent, beside_ours.met) == (150.0, 110.0, True)
    assert (beside_best.opponent_name, beside_best.met) == ("OpenVINO", None)


def test_nobody_to_compare_with_still_makes_a_row() -> None:
    [row] = compare("W1", RATE, [OURS], {BEST: Target("at least 1x", 1.0)})
    assert (row.ours, row.opponent, row.met) == (110.0, None, None)


def test_a_single_stall_shows_in_the_99th_percentile() -> None:
    times = [0.1 + i * 0.01 for i in range(64)]
    assert itl_p99_ms(Answer(tuple(times))) == pytest.approx(10)
    assert itl_p99_ms(Answer((*times, times[-1] + 2))) == pytest.approx(2000)
    assert percentile(range(100), 99) == 99 and percentile([7.0], 99) == 7.0


def test_the_wait_for_the_first_token_counts_in_a_single_stream_rate() -> None:
    assert single_stream_rate(Answer((1.0, 1.5, 2.0))) == pytest.approx(1.5)
