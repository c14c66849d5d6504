"""How this worker's hand-offs ended, counted for as long as it runs. io thread."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.protocol import NO_ROOM, WITHDRAWN
from kvtransfer.sender import Outcome


class Side(Enum):
    """The two ends of a hand-off."""

    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Ending:
    """One way in which hand-offs end."""

    side: Side
    outcome: str


_KNOWN = {WITHDRAWN: "withdrawn", NO_ROOM: "no_room", "kv_digest_mismatch": "corrupt"}


@dataclass(frozen=True, slots=True)
class HandoffTally:
    """Few outcomes, whatever a peer says: the labels of a metric must not grow with what comes from outside."""

    endings: Counter[Ending] = field(default_factory=Counter)
    num_bytes: Counter[Side] = field(default_factory=Counter)

    def sent(self, outcome: Outcome, num_bytes: int) -> None:
        """A transfer from here ended, in whatever way."""
        self.endings[Ending(Side.SEND, outcome.name.lower())] += 1
        self.num_bytes[Side.SEND] += num_bytes

    def received(self, num_bytes: int) -> None:
        """A sequence joined."""
        self.endings[Ending(Side.RECEIVE, "received")] += 1
        self.num_bytes[Side.RECEIVE] += num_bytes

    def not_received(self, reason: str) -> None:
        """A transfer to here ended without its KV. What had come of it counts for nothing."""
        self.endings[Ending(Side.RECEIVE, _KNOWN.get(reason, "failed"))] += 1
