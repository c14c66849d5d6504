"""The public port's one door: every call passes it before anything of it is read. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import grpc

from router.access import Access
from router.status import abort
from splitfire.core.errors import SplitfireError

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


# Of the call that this task serves: its message may still be on the way.
arrived_at: ContextVar[float] = ContextVar("arrived_at")


class Gate(grpc.aio.ServerInterceptor):
    """Answers what `access` does not let through, methods that do not exist among it."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Asked, Answered] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Asked, Answered] | None:
        arrived_at.set(time.monotonic())
        try:
            self._access.check(details.method, details.invocation_metadata)
        except SplitfireError as exc:
            return _refusing(exc)
        return await continuation(details)


def _refusing(error: SplitfireError) -> grpc.RpcMethodHandler[Any, Any]:
    """Of the kind that waits for no message, whatever the method takes."""

    async def refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error, "")

    return grpc.stream_stream_rpc_method_handler(refuse)
