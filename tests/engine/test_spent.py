"""Where an engine's time goes: chunks and waits of a prompt add up, and rows share a step by how many there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfire.engine.spent import MAX_CHUNKS, NOTHING_SPENT, SequenceTimes
from splitfire.v1.inference_pb2 import LEG_FIRST_TOKEN, LEG_REST
from splitfire.worker.timing import Teller

STEPS = st.lists(st.tuples(st.floats(0, 0.1), st.floats(1e-4, 0.3), st.integers(1, 512)), min_size=1, max_size=200)


@given(STEPS)
def test_chunks_and_waits_add_up_however_many_there_are(steps: list[tuple[float, float, int]]) -> None:
    times = SequenceTimes(started=100.0)
    now = 100.0
    for waited, took, tokens in steps:
        times.add_chunk(now + waited, now + waited + took, tokens, 2 * tokens)
        now += waited + took
    times.prompt_done = now
    assert len(times.chunks) <= MAX_CHUNKS
    assert sum(c.waited_s + c.took_s for c in times.chunks) == pytest.approx(now - 100.0)
    assert sum(c.num_tokens for c in times.chunks) == sum(tokens for *_, tokens in steps)
    assert sum(c.num_steps for c in times.chunks) == len(steps)
    assert sum(c.share_s for c in times.chunks) == pytest.approx(sum(took for _, took, _ in steps) / 2)
    timing = Teller("w").prompt(99.5, times, now + 0.001, 7)
    assert sum(p.duration_s for p in timing.phases) == pytest.approx(now + 0.001 - 99.5)
    assert {p.leg for p in timing.phases} == {LEG_FIRST_TOKEN}
    assert timing.cached_tokens == 7


def test_rows_share_a_step_and_all_shares_are_the_whole() -> None:
    spent = NOTHING_SPENT
    rows = {"a": 0.0, "b": 0.0}
    for members in (("a",), ("a", "b"), ("b",), ("a", "b")):
        before = spent
        spent = spent.plus(schedule_s=0.001, draft_s=0.0, forward_s=0.01, sample_s=0.001, num_rows=len(members))
        for member in members:
            rows[member] += spent.since(before).row_s
    total = spent.schedule_s + spent.draft_s + spent.forward_s + spent.sample_s
    assert sum(rows.values()) == pytest.approx(total)
    assert spent.since(NOTHING_SPENT).num_steps == 4


def test_the_steps_of_an_answer_and_what_is_left_of_its_time() -> None:
    spent = NOTHING_SPENT.plus(schedule_s=0.001, draft_s=0.0, forward_s=0.02, sample_s=0.002, num_rows=1)
    phases = Teller("w").rest(spent, 0.03)
    assert [(p.name, p.leg) for p in phases] == [(name, LEG_REST) for name in ("schedule", "forward", "sample", "send")]
    assert sum(p.duration_s for p in phases) == pytest.approx(0.03)
