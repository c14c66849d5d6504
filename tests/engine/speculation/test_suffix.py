"""The suffix structure says what a brute-force search over the whole text would say, however the text came."""

from __future__ import annotations

import random
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from splitfire.engine.speculation.suffix import BULK, MAX_CANDIDATES, MAX_MATCH, MIN_MATCH, Match, SuffixIndex, rolled


def longest(text: list[int], ending: list[int], index: SuffixIndex) -> Match | None:
    """The same by looking everywhere: the latest MAX_CANDIDATES positions under the ending's hash, all of it compared."""

    def bucket(before: list[int]) -> int:
        state = 0
        for token in before[-MIN_MATCH:]:
            state = rolled(state, token)
        return state >> index._down

    best = None
    if len(ending) < MIN_MATCH:
        return None
    places = [at for at in range(len(text) - 1, MIN_MATCH - 1, -1) if bucket(text[:at]) == bucket(ending)]
    for at in places[:MAX_CANDIDATES]:
        length = 0
        while length < min(at, len(ending), MAX_MATCH) and text[at - 1 - length] == ending[-1 - length]:
            length += 1
        if length >= MIN_MATCH and (best is None or length > best.length):
            best = Match(at, length)
    return best


class TextThatGrows(RuleBasedStateMachine):
    """Small alphabets, so that everything repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[int] = []
        self.index = SuffixIndex()
        self.may_find = True

    def take(self, tokens: list[int]) -> None:
        for token in tokens:
            self.text.append(token)
            self.may_find = self.index.append(token)

    @rule(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12))
    def few(self, tokens: list[int]) -> None:
        self.take(tokens)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=BULK, max_size=3 * BULK))
    def many_at_once(self, tokens: list[int]) -> None:
        self.text += tokens
        self.index.extend(tokens)
        self.may_find = True

    @rule(begin=st.integers(0, 200), size=st.integers(1, 90))
    def repeats_itself(self, begin: int, size: int) -> None:
        self.take(self.text[begin : begin + size])

    @rule(token=st.integers(1 << 20, (1 << 21) - 1))
    def large_id(self, token: int) -> None:
        self.take([token])

    @invariant()
    def finds_what_a_search_finds(self) -> None:
        assert self.index.token_ids == self.text
        found = self.index.find(self.text, self.index.state)
        assert found == longest(self.text, self.text, self.index)
        assert found is None or self.may_find

    @rule(ending=st.lists(st.integers(0, 3), max_size=8))
    def somebody_elses_ending(self, ending: list[int]) -> None:
        state = 0
        for token in ending:
            state = rolled(state, token)
        assert self.index.find(ending, state) == longest(self.text, ending, self.index)


TextThatGrows.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestTextThatGrows = TextThatGrows.TestCase


def test_growing_past_its_buckets_loses_nothing() -> None:
    draw = random.Random(1)
    tokens = [draw.randrange(40) for _ in range(9000)]
    grown, piecewise, made = SuffixIndex(), SuffixIndex(), SuffixIndex(tokens)
    for token in tokens:
        grown.append(token)
    for begin in range(0, 9000, 700):
        piecewise.extend(tokens[begin : begin + 700])
    assert grown.state == piecewise.state == made.state
    for _ in range(200):
        at = draw.randrange(50, 9000)
        ending = tokens[at - 20 : at]
        state = 0
        for token in ending:
            state = rolled(state, token)
        match = made.find(ending, state)
        assert match == grown.find(ending, state) == piecewise.find(ending, state)
        assert match is not None and made.token_ids[match.at - match.length : match.at] == ending[-match.length :]
    assert len(made._buckets) <= 4 * len(tokens), "memory: under 32 bytes a token, with a pointer and a link for each"
    assert len(made._links) == len(tokens)


def test_a_long_history_costs_no_more_than_a_short_one() -> None:
    """What a rescan would break: 64k tokens are as quick as 2k, within a wide margin for a busy machine."""
    draw = random.Random(2)

    def best_of(num_tokens: int) -> float:
        index = SuffixIndex([draw.randrange(3000) for _ in range(num_tokens)])
        times = []
        for _ in range(9):
            began = time.perf_counter()
            for _ in range(100):
                index.append(draw.randrange(3000))
                index.find(index.token_ids, index.state)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best_of(65536) < 8 * best_of(2048)
