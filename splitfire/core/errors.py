"""Everything that can go wrong for a caller, as one tree.

    SplitfireError                 code, reason, is_retryable: what a client sees
    ├── InvalidInput               a field the client sent (`invalid_<field>`)
    │   ├── ExceedsContext         prompt and output do not fit the model's context
    │   └── ExceedsPool            the request can never fit this deployment's KV pool
    ├── Unsupported                a field that is not built yet (`unsupported_<field>`)
    ├── NotFound                   no such model
    ├── AlreadyExists              the request id is active
    ├── Forbidden                  only the operator may set it
    ├── Unauthenticated            missing or wrong credential
    ├── Exhausted                  a queue or limit is full (`queue_full`, `slow_consumer`, ...)
    ├── Preempted                  gave its place in a full queue to another before it began (`preempted`)
    ├── Unavailable                no worker of a role, or draining (`no_prefill`, `no_decode`, `draining`)
    ├── DeadlineExceeded           the request's time is over; the reason is the stage it was in
    ├── Cancelled                  the client went away
    ├── DataLoss                   KV arrived corrupt and could not be replaced
    ├── Mismatch                   two processes do not belong together (`fingerprint_<field>`, `version`)
    └── Internal                   a bug, or a worker that broke the protocol
    ConfigError                    a setting or model directory is wrong: exit 2, one line
    └── ModelError                 the model directory

A message carries both numbers, asked and available, and says what to do next. It never carries a path, an address or
another request's data; those go to the log. gRPC errors are made from this tree in `router/status.py` alone.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """google.rpc.Code, the numbers gRPC uses."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class SplitfireError(Exception):
    """What a client is told: a code, a stable reason, a sentence, and whether trying again can help."""

    code = Code.INTERNAL
    is_retryable = False

    def __init__(self, message: str, *, reason: str, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidInput(SplitfireError):
    """A field the client sent is outside what is accepted."""

    code = Code.INVALID_ARGUMENT

    def __init__(self, field: str, message: str, *, reason: str | None = None) -> None:
        root = field.split("[", 1)[0].rsplit(".", 1)[-1]
        super().__init__(f"{field}: {message}", reason=reason or f"invalid_{root}", field=field)


class ExceedsContext(InvalidInput):
    """Prompt and output together are longer than the model's context."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, reason="exceeds_context")


class ExceedsPool(InvalidInput):
    """The request needs more KV blocks than any worker has."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, reason="exceeds_pool")


class Unsupported(SplitfireError):
    """A field of the API that this version does not implement."""

    code = Code.UNIMPLEMENTED

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", reason=f"unsupported_{field}", field=field)


class NotFound(SplitfireError):
    """The named thing does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(SplitfireError):
    """The request id belongs to a request that is still active."""

    code = Code.ALREADY_EXISTS


class Forbidden(SplitfireError):
    """Only the operator may set this."""

    code = Code.PERMISSION_DENIED


class Unauthenticated(SplitfireError):
    """The credential is missing or wrong."""

    code = Code.UNAUTHENTICATED


class Exhausted(SplitfireError):
    """A queue or limit is full; `retry_after_s` says when it may not be."""

    code = Code.RESOURCE_EXHAUSTED
    is_retryable = True


class Preempted(SplitfireError):
    """The request gave its place in a full queue to another, before its first token."""

    code = Code.ABORTED
    is_retryable = True


class Unavailable(SplitfireError):
    """No worker can take the request now."""

    code = Code.UNAVAILABLE
    is_retryable = True


class DeadlineExceeded(SplitfireError):
    """The request's deadline passed; the reason names the stage it was in."""

    code = Code.DEADLINE_EXCEEDED


class Cancelled(SplitfireError):
    """The client cancelled or went away."""

    code = Code.CANCELLED


class DataLoss(SplitfireError):
    """KV arrived corrupt and recomputing it failed as well."""

    code = Code.DATA_LOSS
    is_retryable = True


class Mismatch(SplitfireError):
    """Two processes that do not belong together; the reason names the field."""

    code = Code.FAILED_PRECONDITION


class Internal(SplitfireError):
    """A bug here, or a worker that broke the protocol."""

    def __init__(self, message: str, *, reason: str = "internal") -> None:
        super().__init__(message, reason=reason)


def one_line(text: str, limit: int = 500) -> str:
    """`text` safe to print: what comes from files and peers can neither start a new line nor colour the terminal."""
    shown = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


class ConfigError(Exception):
    """A setting is wrong: the process prints this one line and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ModelError(ConfigError):
    """The model directory is wrong or holds what this version cannot run."""
