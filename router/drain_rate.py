"""How fast the queue really drains: prompt tokens that start per second, while somebody waits. Pure.

What workers compute in a second is what could start; if decode has no room, or prompts have a cost that tokens do not show, less does.
"""

from __future__ import annotations

from math import inf

WINDOW_S, MAX_WINDOW_S, FEW = 2.0, 10.0, 3  # at least so long and so many starts, or so long
SMOOTHING = 0.5  # of each window
KNOWN_FOR_S = 60.0  # a fleet changes


class DrainRate:
    """`tokens_per_s` is infinite until it is known, and again when nobody has waited for a while."""

    def __init__(self) -> None:
        self.tokens_per_s = inf
        self._known_at = -inf
        self._since: float | None = None
        self._num_starts = 0
        self._num_tokens = 0

    def started(self, num_tokens: int) -> None:
        self._num_starts += 1
        self._num_tokens += num_tokens

    def look(self, now: float, *, is_waiting: bool) -> None:
        """After every change of the queue."""
        if now - self._known_at > KNOWN_FOR_S:
            self.tokens_per_s = inf
        if not is_waiting:
            self._since = None
        elif self._since is None:
            self._begin(now)
        else:
            window_s = now - self._since
            if window_s >= MAX_WINDOW_S or (window_s >= WINDOW_S and self._num_starts >= FEW):
                rate = self._num_tokens / window_s
                known = self.tokens_per_s
                self.tokens_per_s = rate if known == inf else known + SMOOTHING * (rate - known)
                self._known_at = now
                self._begin(now)

    def _begin(self, now: float) -> None:
        self._since, self._num_starts, self._num_tokens = now, 0, 0
