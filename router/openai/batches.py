"""Files and batches in OpenAI's JSON: what clients ask for, and what they are shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import Field

from router.batches.records import LineError, Status, StoredBatch, StoredFile
from router.openai.requests import Body, Json, read
from splitfire.core import limits
from splitfire.core.errors import InvalidInput

Seconds = Annotated[int, Field(ge=limits.MIN_FILE_AGE_S, le=limits.MAX_FILE_AGE_S)]
MAX_QUERY_FIELDS = 8


class ExpiresAfter(Json):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: Seconds


class FileFields(Json):
    """POST /v1/files, but the file."""

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class BatchBody(Json):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class FileQuery(Json):
    """GET /v1/files."""

    after: str = ""
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str = ""


class BatchQuery(Json):
    """GET /v1/batches."""

    after: str = ""
    limit: Annotated[int, Field(ge=1, le=100)] = 20


def read_query(kind: type[Body], query: bytes) -> Body:
    """InvalidInput for what is not known, wrong, or there twice."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), max_num_fields=MAX_QUERY_FIELDS
        )
    except (UnicodeDecodeError, ValueError) as exc:
        raise InvalidInput("query", "is no list of name=value") from exc
    given = dict(pairs)
    if len(given) < len(pairs):
        raise InvalidInput("query", "has a name twice")
    return read(kind, given)


def read_form(values: Mapping[str, str]) -> FileFields:
    given: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.partition("[")
        if inner:
            given.setdefault(outer, {})[inner.rstrip("]")] = value
        else:
            given[outer] = value
    return read(FileFields, given)


def check_batch_metadata(metadata: Mapping[str, str] | None) -> None:
    for name, value in (metadata or {}).items():
        if len(name) > limits.MAX_BATCH_METADATA_NAME_CHARS or len(value) > limits.MAX_METADATA_CHARS:
            most = f"{limits.MAX_BATCH_METADATA_NAME_CHARS} and {limits.MAX_METADATA_CHARS} characters"
            raise InvalidInput("metadata", f"accepted: names and values of at most {most}")
    if len(metadata or {}) > limits.MAX_METADATA_ENTRIES:
        raise InvalidInput("metadata", f"has {len(metadata or {})} entries, accepted: at most {limits.MAX_METADATA_ENTRIES}")


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id, "object": "file", "bytes": file.num_bytes, "created_at": file.created_at, "filename": file.filename,
        "purpose": file.purpose, "status": "processed", "status_details": None, "expires_at": file.expires_at,
    }  # fmt: skip


def batch_object(batch: StoredBatch, model: str, *, is_cancelling: bool = False) -> dict[str, Any]:
    """`is_cancelling`: somebody asked for it, and whoever runs the batch has not seen it yet."""
    may_cancel = batch.status in (Status.VALIDATING, Status.IN_PROGRESS)
    status = Status.CANCELLING if is_cancelling and may_cancel else batch.status
    used = batch.used
    return {
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint, "model": model, "errors": _errors(batch.errors),
        "input_file_id": batch.input_file_id, "completion_window": "24h", "status": status,
        "output_file_id": batch.output_file_id if batch.has_output else None,
        "error_file_id": batch.error_file_id if batch.has_errors else None,
        "created_at": batch.created_at, "expires_at": batch.expires_at,
        **{f"{state}_at": batch.at.get(state) for state in Status if state is not Status.VALIDATING},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": used.prompt, "input_tokens_details": {"cached_tokens": used.cached}, "output_tokens": used.generated,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": used.prompt + used.generated,
        },
        "metadata": batch.metadata,
    }  # fmt: skip


def list_object(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    ids = [item["id"] for item in items]
    return {
        "object": "list", "data": items, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": has_more,
    }  # fmt: skip


def _errors(errors: Sequence[LineError]) -> dict[str, Any] | None:
    return {"object": "list", "data": [error.model_dump() for error in errors]} if errors else None
