"""Predicted output: drafts follow a text that the request says its answer will resemble. Pure.

A cursor stands in the given text. Where the answer differs from it, the cursor is set anew by the longest end of the answer
that occurs in the text: anywhere from MIN_MATCH tokens on, near the place where they parted from one. Until something
matches, the text is taken to have been replaced token by token: the cursor goes on beside the answer, and what it
expects is a guess (evidence 0).
"""

from __future__ import annotations

from collections.abc import Sequence

from splitfire.engine.speculation.acceptance import Acceptance
from splitfire.engine.speculation.suffix import MAX_MATCH, MIN_MATCH, SuffixIndex, rolled

MIN_WIDTH, MAX_WIDTH = 16, 128
ONE_BY_ONE = 256  # tokens; more at once go past the shares
BOOKED_AT_ONCE = 8  # tokens that were right: shares need not be newer than that
NEAR = 48  # tokens after the place of parting that a short match counts in
PATIENCE, FIRST_PATIENCE = 48, 16  # tokens without a match until nothing is guessed any more; while there has been none
SOLID = 8  # evidence from which on the cursor is where it should be
MAX_PLACES = 16  # looked at near the place of parting
# Evidence that a place has for being that many tokens from where a replacement of equal length would end. Of single
# equal tokens in edits of Python code, those there were right in .95, up to 4 tokens away in .65, up to 12 in .45, else in .3.
FAR = 13
CLOSENESS = (4, *[2] * 4, *[1] * 8, 0)


class Predicted:
    """The cursor of one sequence. `evidence` counts the tokens in a row it was right about, once `look` has set it."""

    source = "predicted"

    def __init__(self, given: Sequence[int], num_prompt: int, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.num_seen = num_prompt  # tokens of the sequence
        self.evidence = 0
        self._index = SuffixIndex(given)
        self._at = 0  # of the token that is expected next; the text's length: none is
        self._home = 0  # where the cursor last stood for certain
        self._since = 0  # tokens of the answer since then
        self._ending: list[int] = []  # of the answer, the last MAX_MATCH tokens or more
        self._state = 0  # of the rolling hash of the answer
        self._patience = FIRST_PATIENCE
        self._width = MIN_WIDTH
        self._is_lost = False  # the cursor is to be set anew
        self._num_right = 0  # tokens in a row that the shares have not heard of

    def look(self) -> int:
        """How many tokens it could propose now."""
        if self._is_lost:
            self._is_lost = False
            self._anchor()
        return min(self._width, len(self._index.token_ids) - self._at)

    def follow(self, tokens: Sequence[int], count: int) -> None:
        """Takes in the next `count` of the sequence's tokens, output only."""
        begin, self.num_seen = self.num_seen, self.num_seen + count
        if count <= ONE_BY_ONE:
            for token_id in tokens[begin : begin + count]:
                self._advance(token_id)
        else:  # the answer is elsewhere by now: found again by what it ends with
            self._book()
            self._since = self._patience + 1
            for token_id in tokens[begin + count - MAX_MATCH : begin + count]:
                self._take(token_id)
            self._is_lost = True

    def draft(self, width: int) -> tuple[int, ...]:
        return tuple(self._index.token_ids[self._at : self._at + width])

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """Wider after a draft that was right to its end, narrower after another."""
        if num_accepted == num_drafted:
            self._width = min(2 * self._width, MAX_WIDTH)
        else:
            self._width = max(self._width // 2, MIN_WIDTH)

    def _advance(self, token_id: int) -> None:
        self._take(token_id)
        self._since += 1
        if not self._is_lost and self._at < len(self._index.token_ids):
            if self._index.token_ids[self._at] == token_id:
                self._at += 1
                self.evidence += 1
                self._num_right += 1
                if self.evidence >= SOLID:
                    self._home, self._since, self._patience = self._at, 0, PATIENCE
                if self._num_right == BOOKED_AT_ONCE:
                    self._book()
                return
            self._book()
            self.acceptance.missed(self.evidence)
        self._is_lost = True

    def _book(self) -> None:
        if self._num_right:
            self.acceptance.came_true(self.evidence - self._num_right, self._num_right)
            self._num_right = 0

    def _take(self, token_id: int) -> None:
        self._ending.append(token_id)
        self._state = rolled(self._state, token_id)
        if len(self._ending) >= 16 * MAX_MATCH:
            del self._ending[:-MAX_MATCH]

    def _anchor(self) -> None:
        """The cursor where the answer's end is in the text, by the most evidence; if nowhere, where it would be had the text
        been replaced token by token."""
        beside = self._home + self._since
        if self._since <= self._patience:
            at, evidence = self._nearby(beside)
        else:
            beside, at, evidence = len(self._index.token_ids), 0, 0
        if evidence < MIN_MATCH and (match := self._index.find(self._ending, self._state)) is not None:
            at, evidence = match.at, match.length
        self._at, self.evidence = (at, evidence) if evidence else (min(beside, len(self._index.token_ids)), 0)

    def _nearby(self, beside: int) -> tuple[int, int]:
        """Of the places of the last token between where the cursor stood and NEAR behind `beside` the best, and its
        evidence: tokens that match, more for how near it is to `beside`. (0, 0): none."""
        given, ending = self._index.token_ids, self._ending
        last = ending[-1]
        best_at = best = 0
        at, end = self._home, min(beside + NEAR, len(given))
        for _ in range(MAX_PLACES):
            try:
                at = given.index(last, at, end) + 1
            except ValueError:
                break
            most = min(at, len(ending), self._since)
            length = 1
            while length < most and given[at - 1 - length] == ending[-1 - length]:
                length += 1
            evidence = length + CLOSENESS[min(abs(at - beside), FAR)]
            if evidence > best:
                best_at, best = at, evidence
        return best_at, best
