"""Whose prompt is computed next: those with least to compute, but nobody is passed for ever."""

from __future__ import annotations

from splitfire.core.lifecycle import Seq as State
from splitfire.engine.scheduler import AGEING
from splitfire.engine.sequence import Sequence
from tests.engine.test_scheduler import Bench


def computed_in(bench: Bench) -> list[Sequence]:
    """Whose tokens one step computes."""
    return [piece.sequence for piece in bench.step()]


def test_a_short_prompt_passes_a_long_one_between_two_chunks() -> None:
    bench = Bench(128, chunk_tokens=32)
    long = bench.add(400, 1)
    assert computed_in(bench) == [long]
    short = bench.add(16, 1, token=1000)
    assert computed_in(bench) == [short, long]
    assert short.state is State.FINISHED
    assert long.prefilled == 32 + 16


def test_long_ones_are_computed_one_after_another() -> None:
    """Two that shared the steps would both end late."""
    bench = Bench(256, chunk_tokens=32)
    first = bench.add(320, 1)
    computed_in(bench)
    second = bench.add(320, 1, token=1000)
    bench.run([first])
    assert second.prefilled < 32


def test_short_prompts_without_end_hold_a_long_one_up_for_a_bounded_time() -> None:
    bench = Bench(256, chunk_tokens=32)
    long = bench.add(320, 1)
    num_steps = 0
    while long.state is not State.FINISHED:
        bench.add(32, 1, token=1000 + 40 * num_steps)  # a chunk in every step
        bench.step()
        num_steps += 1
        assert num_steps < 100
    # They pass it for AGEING times its own ten chunks, and then it takes ten.
    assert AGEING * 10 - 5 <= num_steps <= AGEING * 10 + 15


def test_what_is_cached_is_nothing_to_compute() -> None:
    bench = Bench(256, chunk_tokens=64)
    bench.run([bench.add(400, 1)])
    busy = bench.add(200, 1, token=1000)
    computed_in(bench)
    known = bench.add(400, 1)  # all but the last block of it
    assert computed_in(bench)[0] is known
    assert busy.prefilled > 0


def test_a_higher_class_goes_first_however_long() -> None:
    bench = Bench(256, chunk_tokens=32)
    bench.add(16, 1, priority=0)
    high = bench.add(320, 1, priority=1, token=1000)
    assert computed_in(bench)[0] is high
