"""What is known of a request when it is over, and who wants to know: traces, metrics, usage. Event loop only; every one of them only
takes notes, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from splitfire.v1 import inference_pb2 as pb

OK, CANCELLED = "ok", "cancelled"


@dataclass(frozen=True, slots=True)
class Ended:
    """One request. No text of it."""

    tenant: str
    key_id: str  # of the key it came with: the beginning of its hash; empty where there are none
    model: str
    outcome: str  # OK, CANCELLED, or the error's stable reason
    ended_at: float  # of this process's monotonic clock
    duration_s: float
    summary: pb.Summary  # as far as it came
    prefill_busy_s: float = 0.0  # its share of workers' steps, all choices
    decode_busy_s: float = 0.0


OnEnded = Callable[[Ended], None]
