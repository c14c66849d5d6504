"""Errors as gRPC statuses with google.rpc details; and what of them is logged, whichever door they leave by."""

from __future__ import annotations

import secrets
from typing import NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from splitfire.core.errors import Internal, SplitfireError

log = structlog.get_logger("router")
DOMAIN = "splitfire"


def status_of(error: SplitfireError, request_id: str, details: dict[str, str] | None = None) -> Status:
    """ErrorInfo with the stable reason, BadRequest naming the field, RetryInfo where trying again makes sense."""
    metadata = {"request_id": request_id, "retryable": "true" if error.is_retryable else "false", **(details or {})}
    status = Status(code=int(error.code), message=str(error))
    _add(status, ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if error.field:
        _add(status, BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=str(error))]))
    if error.is_retryable:
        delay_ms = int((error.retry_after_s or 1.0) * 1000)
        _add(status, RetryInfo(retry_delay=Duration(seconds=delay_ms // 1000, nanos=delay_ms % 1000 * 1_000_000)))
    return status


async def abort(
    context: grpc.aio.ServicerContext[object, object], error: SplitfireError, request_id: str, details: dict[str, str] | None = None
) -> NoReturn:
    """Ends the call with the error's status; an Internal one gets an id that finds its log line."""
    details = {**(details or {}), **log_internal(error, request_id)}
    await context.abort_with_status(rpc_status.to_status(status_of(error, request_id, details)))
    raise AssertionError("abort_with_status returned")


def log_internal(error: SplitfireError, request_id: str) -> dict[str, str]:
    """What finds the log line of an Internal error, which is written here; nothing for others."""
    if not isinstance(error, Internal):
        return {}
    error_id = secrets.token_hex(8)
    log.error("internal error", request_id=request_id, error_id=error_id, reason=error.reason, detail=str(error))
    return {"error_id": error_id}


def unexpected(exc: Exception) -> Internal:
    """What a client may know of a bug: nothing but that it is one. The rest is for the log."""
    log.exception("unexpected error", error=type(exc).__name__)
    return Internal("an internal error; the log has it under error_id")


def _add(status: Status, detail: ErrorInfo | BadRequest | RetryInfo) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)
