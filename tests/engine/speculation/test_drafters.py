"""Drafters that follow a text: where they stand after what was produced, and what they propose."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.engine.speculation.acceptance import Acceptance, Shares
from splitfire.engine.speculation.lookup import ONE_BY_ONE as LOOKUP_ONE_BY_ONE
from splitfire.engine.speculation.lookup import Lookup
from splitfire.engine.speculation.predicted import MAX_WIDTH, MIN_WIDTH, NEAR, ONE_BY_ONE, PATIENCE, Predicted

draw = random.Random(11)
TEXT = [draw.randrange(4000) for _ in range(600)]
OTHER = [4000 + i for i in range(600)]  # in no text


def lookup(*texts: list[int]) -> Lookup:
    drafter = Lookup(Acceptance(Shares()))
    tokens: list[int] = []
    for text in texts:
        tokens += text
        drafter.follow(tokens, len(text))
        drafter.look()
    return drafter


def predicted(given: list[int], *answers: list[int], num_prompt: int = 0) -> Predicted:
    drafter = Predicted(given, num_prompt, Acceptance(Shares()))
    tokens = [0] * num_prompt
    for answer in answers:
        tokens += answer
        drafter.follow(tokens, len(answer))
        drafter.look()
    return drafter


def test_lookup_continues_the_latest_occurrence_of_the_longest_match() -> None:
    drafter = lookup([1, 2, 3, 4, 50, 9, 1, 2, 3, 4, 60, 9, 9, 2, 3, 4, 70, 8, 1, 2, 3, 4])
    assert (drafter.evidence, drafter.draft(2)) == (4, (60, 9))


def test_lookup_proposes_nothing_where_nothing_occurred_before() -> None:
    assert lookup(TEXT[:40]).look() == 0
    assert lookup([1, 2]).look() == 0
    assert lookup([]).look() == 0


def test_lookup_follows_a_repetition_and_notices_its_end() -> None:
    drafter = lookup(TEXT[:300], TEXT[40:60])
    assert (drafter.evidence, drafter.draft(5)) == (20, tuple(TEXT[60:65]))
    tokens = [*TEXT[:300], *TEXT[40:60], *TEXT[60:70], OTHER[0]]
    drafter.follow(tokens, 11)
    assert drafter.look() == 0


def test_lookup_unrolls_a_loop_past_the_end_of_the_text() -> None:
    drafter = lookup([5, 6, 7, 5, 6, 7, 5, 6, 7])
    assert drafter.draft(8) == (5, 6, 7, 5, 6, 7, 5, 6)
    assert lookup([4] * 9).draft(5) == (4,) * 5


def test_lookup_is_where_it_would_be_had_it_seen_every_token() -> None:
    text = [*TEXT[:500], *TEXT[20:400]]
    assert len(text) > LOOKUP_ONE_BY_ONE
    at_once, one_by_one = lookup(text), lookup(*([token] for token in text))
    assert at_once.draft(30) == one_by_one.draft(30) == tuple(TEXT[400:430])


def test_a_text_that_comes_true_is_drafted_wider_and_wider() -> None:
    drafter = predicted(TEXT, TEXT[:1])
    assert drafter.draft(drafter.look()) == tuple(TEXT[1:17])
    widths = []
    for _ in range(5):
        widths.append(drafter.look())
        drafter.verified(drafter.look(), drafter.look())
    assert widths == [16, 32, 64, 128, 128]
    drafter.verified(128, 5)
    assert drafter.look() == 64
    for _ in range(4):
        drafter.verified(16, 0)
    assert (drafter.look(), MAX_WIDTH) == (MIN_WIDTH, 128)


def test_only_what_the_sequence_produced_moves_the_cursor() -> None:
    drafter = predicted(TEXT, TEXT[:10], num_prompt=50)
    assert drafter.num_seen == 60
    assert drafter.draft(3) == tuple(TEXT[10:13])


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_after_a_replaced_span_the_cursor_is_back_at_once(size: int) -> None:
    """Replaced by as many tokens: the guess beside the answer is right as soon as the span is over."""
    drafter = predicted(TEXT, TEXT[:100], OTHER[:size])
    assert (drafter.evidence, drafter.draft(3)) == (0, tuple(TEXT[100 + size : 103 + size]))


@pytest.mark.parametrize("size", [1, 3, 8, NEAR // 2])
def test_after_a_deleted_span_one_token_is_enough(size: int) -> None:
    drafter = predicted(TEXT, TEXT[:100], TEXT[100 + size : 101 + size])
    assert drafter.evidence > 0
    assert drafter.draft(3) == tuple(TEXT[101 + size : 104 + size])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_after_an_inserted_span_one_token_is_enough(size: int) -> None:
    drafter = predicted(TEXT, TEXT[:100], OTHER[:size], TEXT[100:101])
    assert drafter.evidence > 0
    assert drafter.draft(3) == tuple(TEXT[101:104])


def test_far_away_three_tokens_are_enough() -> None:
    for far in (40, 500):
        drafter = predicted(TEXT, TEXT[:200], TEXT[far : far + 3])
        assert (drafter.evidence, drafter.draft(4)) == (3, tuple(TEXT[far + 3 : far + 7]))


def test_the_nearest_of_equal_places_is_chosen() -> None:
    given = [*TEXT[:50], 9, 8, *TEXT[50:60], 9, 7, *TEXT[60:100]]
    assert predicted(given, TEXT[:50], [5, 9]).draft(1) == (8,)
    assert predicted(given, [*TEXT[:50], 9, 8, *TEXT[50:58]], [1, 1, 9]).draft(1) == (7,)


def test_an_answer_unlike_the_text_is_not_guessed_at_for_ever() -> None:
    drafter = predicted(TEXT, TEXT[:50], OTHER[:PATIENCE])
    assert drafter.look() > 0
    tokens = [*TEXT[:50], *OTHER[: PATIENCE + 1]]
    drafter.follow(tokens, 1)
    assert drafter.look() == 0
    drafter.follow([*tokens, *TEXT[300:303]], 3)
    assert drafter.look() > 0
    assert drafter.draft(3) == tuple(TEXT[303:306])


def test_at_the_end_of_the_text_nothing_is_proposed() -> None:
    assert predicted(TEXT, TEXT[:-1]).look() == 1
    assert predicted(TEXT, TEXT).look() == 0
    assert predicted(TEXT, TEXT, [OTHER[0]]).look() == 0
    assert predicted([], [1, 2, 3, 4]).look() == 0


def test_after_tokens_it_was_not_shown_it_finds_itself_again() -> None:
    answer = TEXT[:500]
    assert len(answer) > ONE_BY_ONE
    drafter = predicted(TEXT, answer)
    assert drafter.draft(4) == tuple(TEXT[500:504])
    assert predicted(TEXT, OTHER[:500]).look() == 0


@settings(max_examples=150, deadline=None)
@given(
    given=st.lists(st.integers(0, 4), max_size=60),
    answer=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), max_size=20),
    width=st.integers(1, 200),
)
def test_whatever_comes_proposals_are_pieces_of_the_text(given: list[int], answer: list[list[int]], width: int) -> None:
    drafter, echo = Predicted(given, 0, Acceptance(Shares())), Lookup(Acceptance(Shares()))
    tokens: list[int] = []
    for piece in answer:
        tokens += piece
        drafter.follow(tokens, len(piece))
        echo.follow(tokens, len(piece))
        assert 0 <= drafter.look() <= max(0, len(given))
        draft = drafter.draft(min(width, drafter.look()))
        assert len(draft) == min(width, drafter.look())
        assert ",".join(map(str, draft)) in ",".join(map(str, given))
        if echo.look():
            assert len(echo.draft(width)) == width and set(echo.draft(width)) <= set(tokens)
            assert echo.evidence >= 3
