"""`splitfire.v1.Admin`, for operators. Who may call it is decided before (gate.py). Event loop only."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from router.fleet import Fleet
from router.messages import Malformed, parser, serialize, well_formed
from router.status import abort, unexpected
from splitfire.core import limits
from splitfire.core.errors import InvalidInput, SplitfireError
from splitfire.core.validation import refuse_unknown_fields
from splitfire.v1 import inference_pb2 as pb

SERVICE = "splitfire.v1.Admin"
Context = grpc.aio.ServicerContext[Any, Any]


class AdminApi:
    """What changes a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def handlers(self) -> grpc.GenericRpcHandler:
        change_role = grpc.unary_unary_rpc_method_handler(self.change_role, parser(pb.ChangeRoleRequest), serialize)
        return grpc.method_handlers_generic_handler(SERVICE, {"ChangeRole": change_role})

    async def change_role(self, request: pb.ChangeRoleRequest | Malformed, context: Context) -> pb.ChangeRoleResponse:
        try:
            message = well_formed(request)
            refuse_unknown_fields(message)
            if not 1 <= len(message.worker_id) <= limits.MAX_WORKER_ID_CHARS or not message.worker_id.isprintable():
                accepted = f"accepted: 1 to {limits.MAX_WORKER_ID_CHARS} printable characters; GetFleet names the workers"
                raise InvalidInput("worker_id", accepted)
            if message.role not in (pb.ROLE_PREFILL, pb.ROLE_DECODE):
                raise InvalidInput("role", f"is {message.role}, accepted: ROLE_PREFILL or ROLE_DECODE")
            self._fleet.change_role(message.worker_id, message.role)
            return pb.ChangeRoleResponse()
        except SplitfireError as exc:
            await abort(context, exc, "")
        except (asyncio.CancelledError, grpc.RpcError):
            raise
        except Exception as exc:
            await abort(context, unexpected(exc), "")
