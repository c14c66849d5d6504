"""A file and a batch as they are stored, and the states of a batch. Pure.

    validating ──── every line is a request ──→ in_progress ─┬─ every one is answered ──→ finalizing ──→ completed
        ├─ a line is none ──→ failed                         ├─ 24 h are over ─────────→ finalizing ──→ expired
        └─ cancel ──→ cancelling ──→ cancelled               └─ cancel ──→ cancelling ──→ cancelled

A disk that is full, or a tenant that is gone, makes any of them fail.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from enum import Enum, StrEnum

from pydantic import BaseModel, ConfigDict

from splitfire.core.lifecycle import advance

FILE, BATCH = "file-", "batch_"


class Status(StrEnum):
    """Of a batch."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Event(Enum):
    """What can happen to a batch."""

    VALID = "valid"
    ALL_ANSWERED = "all answered"
    CANCEL = "cancel"
    EXPIRE = "expire"
    FAIL = "fail"
    FILES_MADE = "files made"


BATCH_STATES: dict[Status, dict[Event, Status]] = {
    Status.VALIDATING: {
        Event.VALID: Status.IN_PROGRESS,
        Event.CANCEL: Status.CANCELLING,
        Event.EXPIRE: Status.EXPIRED,
        Event.FAIL: Status.FAILED,
    },
    Status.IN_PROGRESS: {
        Event.ALL_ANSWERED: Status.FINALIZING,
        Event.CANCEL: Status.CANCELLING,
        Event.EXPIRE: Status.FINALIZING,
        Event.FAIL: Status.FAILED,
    },
    Status.FINALIZING: {Event.FILES_MADE: Status.COMPLETED, Event.EXPIRE: Status.EXPIRED, Event.FAIL: Status.FAILED},
    Status.CANCELLING: {Event.FILES_MADE: Status.CANCELLED, Event.FAIL: Status.FAILED},
    Status.COMPLETED: {},
    Status.FAILED: {},
    Status.EXPIRED: {},
    Status.CANCELLED: {},
}


class Record(BaseModel):
    """What is stored is read as strictly as what comes from outside: somebody may have edited it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(Record):
    """A file's metadata; its content lies beside it."""

    id: str
    num_bytes: int
    created_at: int
    filename: str  # as the client called it; never a path here
    purpose: str
    expires_at: int | None = None


class LineError(Record):
    """What is wrong with a file of requests."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class TokensUsed(Record):
    """By the answers of a batch."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class StoredBatch(Record):
    """All that is known of a batch but its answers. Replaced as a whole, by the process that runs it."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    output_file_id: str  # these are as good as the files are there
    error_file_id: str
    created_at: int
    expires_at: int
    output_expires_s: int | None = None
    metadata: Mapping[str, str] | None = None
    status: Status = Status.VALIDATING
    at: Mapping[Status, int] = {}  # when it came to be in a state
    total: int = 0
    completed: int = 0
    failed: int = 0
    used: TokensUsed = TokensUsed()
    errors: tuple[LineError, ...] = ()
    is_expired: bool = False  # before all was answered
    has_output: bool = False
    has_errors: bool = False

    def after(self, event: Event, now: int) -> StoredBatch:
        """IllegalTransition where the table has none."""
        status = advance(BATCH_STATES, self.status, event)
        return self.model_copy(update={"status": status, "at": {**self.at, status: now}})

    @property
    def is_over(self) -> bool:
        return not BATCH_STATES[self.status]


def new_id(prefix: str, now: float) -> str:
    """Later ones sort after earlier ones."""
    return f"{prefix}{int(now * 1e6):014x}{secrets.token_hex(9)}"


def is_id(value: str, prefix: str) -> bool:
    """Whether it could be one: nothing else ever becomes a part of a path."""
    rest = value.removeprefix(prefix)
    return value.startswith(prefix) and len(rest) == 32 and not set(rest) - set("0123456789abcdef")
