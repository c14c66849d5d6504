"""How often drafts come true: running shares by source and evidence, and what they say of the next draft. Pure.

Evidence is how many tokens in a row a drafter's text has been right so far. A drafter that follows a text is right or
wrong at every token that is produced, drafted or not, so its shares are learnt for nothing: no draft is ever made to
find out.

Of one sequence too little is known for shares of its own, and too much for those of all: both are kept, and believed by
how well each foretold what came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, log

# Evidence falls into bins: 0, 1, 2, 3, 4-5, 6-8, 9-15, 16-31, 32 and more.
_FIRSTS = (0, 1, 2, 3, 4, 6, 9, 16, 32)
NUM_BINS = len(_FIRSTS)
_MOST = _FIRSTS[-1]
_BIN_OF = tuple(sum(first <= evidence for first in _FIRSTS) - 1 for evidence in range(_MOST + 1))

# Of a text that follows another (a later edit of it, or a repetition), before anything is known: misses by bin.
PRIOR = (0.85, 0.65, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.03)
EVERYONE_WEIGHT, EVERYONE_SLOWEST = 8.0, 1 / 256  # observations that the prior counts for; least weight of a new one
OWN_WEIGHT, OWN_SLOWEST = 2.0, 1 / 32
MEMORY = 64.0  # tokens of a sequence that count against what all sequences say
TRUST = 8.0  # misses that all sequences say count for, of one
LEAST_MISS, MOST_MISS = 0.002, 0.998
FORGETTING = 0.98  # a token, of which shares foretold better
MOST_BELIEF = 4.0  # in either, as a logarithm of odds


class Shares:
    """For each bin the share of tokens that were missed: the mean of what was seen, later forgetting the oldest."""

    def __init__(self, prior: Sequence[float] = PRIOR, weight: float = EVERYONE_WEIGHT, slowest: float = EVERYONE_SLOWEST) -> None:
        self.misses = list(prior)
        self._weights = [1.0 / (weight + 1.0)] * len(self.misses)  # of the next observation
        self._slowest = slowest

    def came_true(self, at: int, count: int) -> None:
        """`count` tokens of bin `at`."""
        weight = self._weights[at]
        self.misses[at] *= 1.0 - weight if count == 1 else (1.0 - weight) ** count
        if weight > self._slowest:
            self._weights[at] = max(self._slowest, weight / (1.0 + count * weight))

    def missed(self, at: int) -> None:
        weight = self._weights[at]
        self.misses[at] += (1.0 - self.misses[at]) * weight
        if weight > self._slowest:
            self._weights[at] = max(self._slowest, weight / (1.0 + weight))


class Acceptance:
    """One source's for one sequence. Common shares times a factor, or its own."""

    def __init__(self, everyone: Shares) -> None:
        self._everyone = everyone
        self._expected = TRUST  # misses by the common shares, of its last MEMORY tokens
        self._misses = TRUST
        self._own = Shares(everyone.misses, OWN_WEIGHT, OWN_SLOWEST)
        self._belief = 0.0  # in its own shares

    def missed(self, evidence: int) -> None:
        at = _BIN_OF[evidence] if evidence < _MOST else NUM_BINS - 1
        common = self._everyone.misses[at]
        self._believe(FORGETTING, log(_possible(self._own.misses[at]) / _possible(common * self._misses / self._expected)))
        self._remember(1, common, 1.0)
        self._own.missed(at)
        self._everyone.missed(at)

    def came_true(self, evidence: int, count: int = 1) -> None:
        """`count` tokens in a row, the first of them at `evidence`."""
        if evidence >= _MOST or _BIN_OF[evidence] == _BIN_OF[min(evidence + count - 1, _MOST)]:
            self._came_true(_BIN_OF[min(evidence, _MOST)], count)
            return
        for at, num_tokens in _bins(evidence, count):
            self._came_true(at, num_tokens)

    def _came_true(self, at: int, count: int) -> None:
        common = self._everyone.misses[at]
        own_hit, common_hit = 1.0 - _possible(self._own.misses[at]), 1.0 - _possible(common * self._misses / self._expected)
        self._believe(FORGETTING if count == 1 else FORGETTING**count, count * log(own_hit / common_hit))
        self._remember(count, count * common, 0.0)
        self._own.came_true(at, count)
        self._everyone.came_true(at, count)

    def survival(self, evidence: int, width: int, least: float) -> list[float]:
        """For each of the next `width` tokens the chance that it and all before it come true, as long as it is `least`."""
        own = 1.0 / (1.0 + exp(-self._belief))
        common = (1.0 - own) * self._misses / self._expected
        pairs = zip(self._everyone.misses, self._own.misses, strict=True)
        hits = [1.0 - _possible(common * theirs + own * mine) for theirs, mine in pairs]
        chances: list[float] = []
        chance = 1.0
        for at in range(evidence, evidence + width):
            chance *= hits[_BIN_OF[at]] if at < _MOST else hits[-1]
            if chance < least:
                break
            chances.append(chance)
        return chances

    def _believe(self, kept: float, log_odds: float) -> None:
        belief = self._belief * kept + log_odds
        self._belief = -MOST_BELIEF if belief < -MOST_BELIEF else MOST_BELIEF if belief > MOST_BELIEF else belief

    def _remember(self, count: int, expected: float, misses: float) -> None:
        """TRUST misses of the common shares are never forgotten."""
        kept = 1.0 - count / MEMORY if count < MEMORY else 0.0
        self._expected = TRUST + (self._expected - TRUST) * kept + expected
        self._misses = TRUST + (self._misses - TRUST) * kept + misses


def _possible(miss: float) -> float:
    return LEAST_MISS if miss < LEAST_MISS else MOST_MISS if miss > MOST_MISS else miss


def _bins(evidence: int, count: int) -> Iterator[tuple[int, int]]:
    """The bins that a run passes through, and how many of its tokens are in each."""
    end = evidence + count
    while evidence < end:
        at = _BIN_OF[evidence] if evidence < _MOST else NUM_BINS - 1
        last = end if at == NUM_BINS - 1 else min(end, _FIRSTS[at + 1])
        yield at, last - evidence
        evidence = last
