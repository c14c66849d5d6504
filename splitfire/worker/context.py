"""What a role's service gets from the worker it runs in, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer.agent import TransferAgent
from splitfire.core.errors import SplitfireError
from splitfire.core.layout import KvLayout
from splitfire.core.telemetry import Telemetry
from splitfire.engine.sequence import SeqId
from splitfire.engine.updates import SequenceUpdate
from splitfire.worker.host import EngineHost
from splitfire.worker.job import Handoff, Job, Replies
from splitfire.worker.tally import HandoffTally
from splitfire.worker.timing import Teller


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Everything is for the io thread."""

    worker_id: str
    host: EngineHost
    agent: TransferAgent
    layout: KvLayout
    telemetry: Telemetry
    kv_digest: bool = True
    clock: Callable[[], float] = time.monotonic
    tally: HandoffTally = field(default_factory=HandoffTally)

    @property
    def teller(self) -> Teller:
        return Teller(self.worker_id)


class RoleService(Protocol):
    """One end of a hand-off. Jobs are known to it by their sequence ids until it calls their last reply."""

    def submit(self, job: Job) -> None: ...

    def owns(self, seq_id: SeqId) -> bool: ...

    def on_started(self, seq_id: SeqId) -> None:
        """The engine begins to compute the sequence."""

    def on_update(self, update: SequenceUpdate) -> None:
        """A step computed a piece of the sequence."""

    def cancel(self, replies: Replies, attempt: int | None, choice: int | None = None) -> None:
        """Ends one attempt of a router, or (None) all of them; of one with several choices this one, or (None) all. No reply is owed."""

    def give_back(self, replies: Replies, error: SplitfireError, *, only_waiting: bool) -> None:
        """Ends a router's jobs with `error`, all of them or those that have not begun: others may take them."""

    def fail(self, seq_id: SeqId, error: SplitfireError) -> None:
        """Ends one job with `error`: what it holds is given back, the router is told."""

    @property
    def num_jobs(self) -> int: ...


class GeneratingService(RoleService, Protocol):
    """The receiving end."""

    def on_token(self, seq_id: SeqId, offset: int, token_id: int) -> None:
        """A step got one more token for a sequence that decodes, and there is nothing else to say about it."""


class SendingService(RoleService, Protocol):
    """The sending end."""

    def redirect(self, replies: Replies, attempt: int, handoff: Handoff) -> None:
        """The router names another receiver for a prompt that is here."""
