"""Prompt lookup: what followed the last time the sequence, prompt and output, ended as it does now. Pure.

While the text goes on as it did then, the place is followed token by token; the index is searched only after a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitfire.engine.speculation.acceptance import Acceptance
from splitfire.engine.speculation.suffix import SuffixIndex

MAX_WIDTH = 128
ONE_BY_ONE = 256  # tokens; more at once go past the shares
BOOKED_AT_ONCE = 8  # tokens that were right: shares need not be newer than that


class Lookup:
    """Follows one sequence's own text. `evidence` is the length of the match that `look` found."""

    source = "lookup"

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.num_seen = 0  # tokens of the sequence
        self.evidence = 0
        self._index = SuffixIndex()
        self._at = 0  # of the token that is expected next; 0: nothing is
        self._may_match = False  # something, if it is looked for
        self._num_right = 0  # tokens in a row that the shares have not heard of

    def follow(self, tokens: Sequence[int], count: int) -> None:
        """Takes in the next `count` of the sequence's tokens, prompt included."""
        begin, self.num_seen = self.num_seen, self.num_seen + count
        if count == 1:
            self._take(tokens[begin])
        elif count <= ONE_BY_ONE:
            for token_id in tokens[begin : begin + count]:
                self._take(token_id)
        else:  # a prompt, or what came while nobody asked: nothing to learn from
            self._book()
            self._index.extend(tokens[begin : begin + count])
            self._at, self._may_match = 0, True

    def look(self) -> int:
        """How many tokens it could propose now."""
        if self._at:
            return MAX_WIDTH
        if not self._may_match:
            return 0
        self._may_match = False
        match = self._index.find(self._index.token_ids, self._index.state)
        if match is None:
            return 0
        self._at, self.evidence = match.at, match.length
        return MAX_WIDTH

    def draft(self, width: int) -> tuple[int, ...]:
        """The tokens that followed then; past the end of the text, where it would repeat itself, the repetition."""
        tokens, at = self._index.token_ids, self._at
        piece = tokens[at : at + width]
        period = len(tokens) - at
        while len(piece) < width:
            piece += piece[-period:][: width - len(piece)]
        return tuple(piece)

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """Nothing to learn: `follow` will see the tokens."""

    def _take(self, token_id: int) -> None:
        at = self._at
        if at:
            if self._index.token_ids[at] == token_id:
                self._at = at + 1
                self.evidence += 1
                self._num_right += 1
                if self._num_right == BOOKED_AT_ONCE:
                    self._book()
            else:
                self._book()
                self.acceptance.missed(self.evidence)
                self._at = 0
        self._may_match = self._index.append(token_id)

    def _book(self) -> None:
        if self._num_right:
            self.acceptance.came_true(self.evidence - self._num_right, self._num_right)
            self._num_right = 0
