"""The error tree as OpenAI's clients expect it: a status code, and an object that names type, parameter and code. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from splitfire.core.errors import Code, SplitfireError

INVALID, SERVER = "invalid_request_error", "server_error"
KINDS: Mapping[Code, tuple[int, str]] = {
    Code.INVALID_ARGUMENT: (400, INVALID),
    Code.UNIMPLEMENTED: (400, INVALID),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.NOT_FOUND: (404, INVALID),
    Code.ALREADY_EXISTS: (409, INVALID),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.ABORTED: (429, "rate_limit_error"),
    Code.CANCELLED: (499, INVALID),
    Code.UNAVAILABLE: (503, SERVER),
    Code.DEADLINE_EXCEEDED: (504, SERVER),
}
BY_REASON: Mapping[str, int] = {
    "not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "file_in_use": 409,
    "body_too_large": 413,
    "file_too_large": 413,
    "files_full": 413,
    "content_type": 415,
}
CODES: Mapping[str, str] = {
    "exceeds_context": "context_length_exceeded",
    "unknown_api_key": "invalid_api_key",
}  # OpenAI's own words
# Where a field of inference.proto is called otherwise, or lies deeper, than here.
PARAMS: Mapping[str, str] = {
    "text": "prompt", "prompt_token_ids": "prompt", "predicted_output": "prediction", "stop_token_ids": "stop_token_ids",
    "session_id": "prompt_cache_key", "request_id": "request_id", "body": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HttpError:
    """What is sent."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def http_error(error: SplitfireError, request_id: str = "", partial: Mapping[str, str] | None = None) -> HttpError:
    """`partial`: how much of the answer came before."""
    status, kind = KINDS.get(error.code, (500, SERVER))
    status = BY_REASON.get(error.reason, status)
    described: dict[str, object] = {
        "message": str(error), "type": kind, "param": param_of(error.field), "code": CODES.get(error.reason, error.reason),
    }  # fmt: skip
    if request_id:
        described["request_id"] = request_id
    described.update(partial or {})
    headers: list[tuple[bytes, bytes]] = []
    if error.is_retryable and status in (429, 503):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s or 1.0))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return HttpError(status, json.dumps({"error": described}).encode(), tuple(headers))


def param_of(field: str) -> str | None:
    """The parameter of this API that a field of ours was made from."""
    root = field.removeprefix("sampling.").removeprefix("stopping.")
    name, *rest = root.split("[", 1)
    return "[".join([PARAMS.get(name, name), *rest]) or None
