"""Whether a choice whose attempt failed is tried again, and how. Pure.

a worker left on purpose          again, elsewhere
a worker died computing it        again; after the second death once more, alone on a worker; then it is suspected poison
a worker died, it only waited     again
anything else worth a retry       again, MAX_ATTEMPTS in all, out of a budget of a tenth of what is offered
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from splitfire.core import limits
from splitfire.core.errors import Internal, SplitfireError, Unavailable

MAX_MOVES = 16  # of a choice, for which nothing is to blame but its workers
MAX_DEATHS = 2
BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# A worker's refusals that say nothing of the request: it may go elsewhere.
MOVES = frozenset({"draining", "role_change", "queue_full"})


class WorkerLost(Unavailable):
    """A worker of the attempt is gone. `is_death`: not on purpose. `was_computing`: it had begun with the request."""

    def __init__(self, reason: str, *, is_death: bool, was_computing: bool) -> None:
        super().__init__("a worker was lost", reason=reason)
        self.is_death = is_death
        self.was_computing = was_computing


class RetryBudget:
    """A tenth of a retry for each request that is offered, saved up to BURST: however many fail, load grows by a tenth (SRE book, ch. 22)."""

    SHARE, BURST = 0.1, 10.0

    def __init__(self) -> None:
        self._saved = self.BURST

    def offered(self) -> None:
        """A new choice of a request."""
        self._saved = min(self.BURST, self._saved + self.SHARE)

    def take(self) -> bool:
        """Whether one may be tried again."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True


class Next(Enum):
    """What follows a failed attempt."""

    AGAIN = "again"
    ALONE = "alone"
    GIVE_UP = "give up"


@dataclass(slots=True)
class Tries:
    """What has happened to one choice."""

    num_failed: int = 0
    num_deaths: int = 0
    num_moves: int = 0
    is_alone: bool = False
    last_reason: str = ""

    @property
    def backoff_s(self) -> float:
        """The longest pause before the next attempt; it is drawn from 0 on."""
        return float(min(MAX_BACKOFF_S, BACKOFF_S * 2 ** max(0, self.num_failed + self.num_moves + self.num_deaths - 1)))

    def after(self, error: SplitfireError, budget: RetryBudget) -> Next:
        """What comes next; where it is to give up, `verdict` says with which error."""
        reason, self.last_reason = self.last_reason, error.reason
        if not error.is_retryable:
            return Next.GIVE_UP
        if isinstance(error, WorkerLost) and error.is_death and error.was_computing:
            self.num_deaths += 1
            if self.is_alone:
                return Next.GIVE_UP
            self.is_alone = self.num_deaths >= MAX_DEATHS
            return Next.ALONE if self.is_alone else Next.AGAIN
        if isinstance(error, WorkerLost) or error.reason in MOVES:
            self.num_moves += 1
            return Next.AGAIN if self.num_moves <= MAX_MOVES else Next.GIVE_UP
        self.num_failed += 1
        is_corrupt_again = reason == error.reason == "kv_digest_mismatch"
        if self.num_failed >= limits.MAX_ATTEMPTS or is_corrupt_again or not budget.take():
            return Next.GIVE_UP
        return Next.AGAIN

    def verdict(self, error: SplitfireError) -> SplitfireError:
        """What the client is told in the end."""
        if self.num_deaths > MAX_DEATHS:
            return Internal(
                f"{self.num_deaths} workers died while they computed this request, the last time alone",
                reason="request_suspected_poison",
            )
        return error
