"""Where a choice's time went: the phases of each leg follow one another and add up to it, whatever workers say and whatever fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.timeline import MOST_S, Timeline, believed_s
from splitfire.v1.inference_pb2 import LEG_FIRST_TOKEN, LEG_REST, LEG_SECOND_TOKEN, Leg, Phase

PROMPT = (("prefill-queue", 0.010), ("prefill", 0.100), ("first_token", 0.001))


def told(leg: Leg.ValueType, *parts: tuple[str, float]) -> list[Phase]:
    return [Phase(name=name, duration_s=seconds, worker="w", leg=leg) for name, seconds in parts]


def begun(accepted_at: float = 1000.0) -> Timeline:
    """Dispatched after 4 ms."""
    timeline = Timeline(accepted_at)
    timeline.queued(accepted_at + 0.001)
    timeline.place_began, timeline.placed_at = accepted_at + 0.002, accepted_at + 0.003
    timeline.dispatched(accepted_at + 0.004)
    return timeline


def names_and_ms(phases: Sequence[Phase], leg: Leg.ValueType) -> list[tuple[str, float]]:
    return [(p.name, round(p.duration_s * 1e3, 6)) for p in phases if p.leg == leg]


def assert_adds_up(timeline: Timeline) -> None:
    phases, at = timeline.phases(), 0.0
    legs = (timeline.first_token_s, timeline.second_token_s, timeline.rest_s)
    for leg, seconds in zip((LEG_FIRST_TOKEN, LEG_SECOND_TOKEN, LEG_REST), legs, strict=True):
        assert sum(p.duration_s for p in phases if p.leg == leg) == pytest.approx(seconds, abs=1e-9)
    for phase in phases:
        assert phase.duration_s > 0
        assert phase.start_s == pytest.approx(at, abs=1e-9)
        at += phase.duration_s


def test_a_hand_off_leg_by_leg() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.120)
    timeline.sent(1, 1000.121)
    timeline.told(told(LEG_SECOND_TOKEN, ("unpack", 0.002), ("join", 0.001), ("step", 0.005)), 1, 2, 1000.132)
    timeline.sent(2, 1000.133)
    timeline.shipped(told(LEG_SECOND_TOKEN, ("grant", 0.0005), ("pack", 0.0015)))
    timeline.finished(told(LEG_REST, ("schedule", 0.01), ("forward", 0.08), ("send", 0.005)))
    timeline.sent(20, 1000.233)
    assert_adds_up(timeline)
    phases = timeline.phases()
    assert names_and_ms(phases, LEG_FIRST_TOKEN) == [
        ("accept", 1), ("admit", 1), ("place", 1), ("dispatch", 1),
        ("prefill-queue", 10), ("prefill", 100), ("first_token", 1), ("transit", 5), ("stream", 1),
    ]  # fmt: skip
    assert names_and_ms(phases, LEG_SECOND_TOKEN) == [
        ("grant", 0.5), ("pack", 1.5), ("wire", 1), ("unpack", 2), ("join", 1), ("step", 5), ("stream", 1),
    ]  # fmt: skip
    assert names_and_ms(phases, LEG_REST) == [("schedule", 10), ("forward", 80), ("send", 5), ("stream", 5)]


def test_what_was_over_before_the_client_had_token_1_is_not_part_of_the_next_leg() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.120)
    timeline.told(told(LEG_SECOND_TOKEN, ("unpack", 0.002), ("join", 0.001), ("step", 0.005)), 1, 2, 1000.132)
    timeline.sent(1, 1000.129)  # the client was slow
    timeline.sent(2, 1000.133)
    timeline.shipped(told(LEG_SECOND_TOKEN, ("grant", 0.0005), ("pack", 0.0015)))
    assert_adds_up(timeline)
    assert names_and_ms(timeline.phases(), LEG_SECOND_TOKEN) == [("step", 3), ("stream", 1)]


def test_two_tokens_in_the_first_message_leave_nothing_for_the_second_leg() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 2, 1000.120)
    timeline.sent(2, 1000.121)
    assert_adds_up(timeline)
    assert not names_and_ms(timeline.phases(), LEG_SECOND_TOKEN)


def test_the_second_token_may_be_here_before_the_first_ones_own_frame() -> None:
    timeline = begun()
    timeline.told(told(LEG_SECOND_TOKEN, ("unpack", 0.002), ("step", 0.005)), 0, 2, 1000.130)
    timeline.sent(2, 1000.131)
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 2, 2, 1000.132)
    assert_adds_up(timeline)
    names = [name for name, _ in names_and_ms(timeline.phases(), LEG_FIRST_TOKEN)]
    assert names[4:] == ["prefill-queue", "prefill", "first_token", "transit", "stream"]


def test_attempts_that_failed_before_the_first_token_are_shown() -> None:
    timeline = begun()
    timeline.interrupted(1000.050)
    timeline.queued(1000.060)
    timeline.place_began, timeline.placed_at = 1000.061, 1000.062
    timeline.dispatched(1000.063)
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.180)
    timeline.sent(1, 1000.181)
    assert_adds_up(timeline)
    names = [name for name, _ in names_and_ms(timeline.phases(), LEG_FIRST_TOKEN)]
    assert names == [
        "accept", "admit", "place", "dispatch", "failed", "backoff", "admit", "place", "dispatch",
        "prefill-queue", "prefill", "first_token", "transit", "stream",
    ]  # fmt: skip


def test_a_death_between_tokens_is_shown_as_what_it_cost() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.120)
    timeline.sent(1, 1000.120)
    timeline.told(told(LEG_SECOND_TOKEN, ("step", 0.005)), 1, 2, 1000.130)
    timeline.sent(2, 1000.130)
    timeline.interrupted(1000.180)
    timeline.queued(1000.181)  # changes nothing any more
    timeline.dispatched(1000.182)
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 7, 8, 1000.380)
    timeline.finished(told(LEG_REST, ("forward", 0.090)))
    timeline.sent(20, 1000.480)
    assert_adds_up(timeline)
    assert names_and_ms(timeline.phases(), LEG_REST) == [("decode", 50), ("recover", 200), ("forward", 90), ("stream", 10)]
    assert not [p for p in timeline.phases() if p.name == "prefill" and p.leg != LEG_FIRST_TOKEN]


def test_a_death_right_after_the_first_token_belongs_to_the_second_leg() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.120)
    timeline.sent(1, 1000.120)
    timeline.interrupted(1000.130)
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 1, 2, 1000.330)
    timeline.sent(2, 1000.331)
    timeline.shipped(told(LEG_SECOND_TOKEN, ("pack", 0.1)))  # not by the attempt that made the token
    assert_adds_up(timeline)
    assert names_and_ms(timeline.phases(), LEG_SECOND_TOKEN) == [("decode", 10), ("recover", 200), ("stream", 1)]


def test_totals_longer_than_the_leg_are_shortened_alike() -> None:
    timeline = begun()
    timeline.told(told(LEG_FIRST_TOKEN, *PROMPT), 0, 1, 1000.120)
    timeline.sent(1, 1000.120)
    timeline.told([], 1, 2, 1000.130)
    timeline.sent(2, 1000.140)  # late, so that what follows looks shorter than it was
    timeline.finished(told(LEG_REST, ("schedule", 0.010), ("forward", 0.090)))
    timeline.sent(9, 1000.190)
    assert_adds_up(timeline)
    assert names_and_ms(timeline.phases(), LEG_REST) == [("schedule", 5), ("forward", 45)]


DURATION = st.floats(0, 0.05) | st.floats(0, 1e5) | st.sampled_from([0.0, 1e-9, 1e300, float("inf"), float("nan"), -1.0])


@example([("t", 0.0, [1e300]), ("s", 0.0, [])])
@example(
    [("t", 0.0, [8e4]), ("s", 0.0, []), ("t", 0.0, [float("nan")]), ("s", 0.1, []), ("f", 0.0, [9e4]), ("t", 0, []), ("s", 0.1, [])]
)
@given(st.lists(st.tuples(st.sampled_from("tsibfhd"), st.floats(0, 0.05), st.lists(DURATION, max_size=4)), max_size=25))
def test_whatever_happens_in_whatever_order_it_adds_up(events: list[tuple[str, float, list[float]]]) -> None:
    timeline, now, tokens, sent = begun(), 1000.004, 0, 0
    for kind, passed, durations in events:
        now += passed
        parts = [("a", seconds) for seconds in durations]
        if kind == "t":
            legs = (LEG_FIRST_TOKEN, LEG_SECOND_TOKEN, LEG_REST)
            timeline.told([p for leg in legs for p in told(leg, *parts)], tokens, tokens + 1, now)
            tokens += 1
        elif kind == "b":
            timeline.told(told(LEG_SECOND_TOKEN, *parts), tokens, tokens, now)
        elif kind == "s" and tokens > sent:
            sent = tokens
            timeline.sent(sent, now)
        elif kind == "i":
            timeline.interrupted(now)
        elif kind == "d":
            timeline.queued(now)
            timeline.place_began = timeline.placed_at = now
            timeline.dispatched(now)
        elif kind == "f":
            timeline.finished(told(LEG_REST, *parts))
        elif kind == "h":
            timeline.shipped(told(LEG_SECOND_TOKEN, *parts))
    if timeline.first_sent_at is not None:
        assert_adds_up(timeline)


@pytest.mark.parametrize("said", [-1.0, float("nan"), float("inf"), -float("inf"), 2 * MOST_S])
def test_seconds_that_cannot_be_are_none(said: float) -> None:
    assert believed_s(said) == 0.0
    assert believed_s(0.25) == 0.25
