"""The public gRPC service: a door to `inference.py`. One handler per call; everything it started ends with it.

Messages are parsed here, not by the generated code, so that bytes that are no message get an honest INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from router.describe import Describer
from router.ended import Ended
from router.fleet import Fleet
from router.flow import Flow
from router.gate import arrived_at
from router.inference import Call, Inference
from router.messages import Malformed, parser, serialize, well_formed
from router.recent import MAX_RECENT, Recent
from router.status import abort, unexpected
from router.tenants import DEFAULT
from splitfire.core.errors import SplitfireError
from splitfire.core.ranges import require
from splitfire.core.validation import refuse_unknown_fields
from splitfire.v1 import inference_pb2 as pb

SERVICE = "splitfire.v1.Inference"
Context = grpc.aio.ServicerContext[Any, Any]


class InferenceApi:
    """`splitfire.v1.Inference`."""

    def __init__(self, inference: Inference, fleet: Fleet, flow: Flow, describe: Describer, recent: Recent) -> None:
        self._inference = inference
        self._fleet = fleet
        self._flow = flow
        self._describe = describe
        self._recent = recent

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the server registers instead of the generated servicer."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self.generate, parser(pb.GenerateRequest), serialize),
            "Tokenize": unary(self.tokenize, parser(pb.TokenizeRequest), serialize),
            "ListModels": unary(self.list_models, parser(pb.ListModelsRequest), serialize),
            "GetFleet": unary(self.get_fleet, parser(pb.GetFleetRequest), serialize),
            "GetTraces": unary(self.get_traces, parser(pb.GetTracesRequest), serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: pb.GenerateRequest | Malformed, context: Context) -> None:
        call = Call(DEFAULT, accepted_at=arrived_at.get())
        try:
            message = well_formed(request)
            metadata = context.invocation_metadata() or ()
            call.tenant = self._inference.access.tenant(metadata)
            call.traceparent = _traceparent(context)
            call.remaining_s = context.time_remaining()  # None without a deadline, whatever the stubs say
            await self._inference.generate(message, call, context.write)
        except SplitfireError as exc:
            await abort(context, exc, call.request_id, call.partial)
        except (asyncio.CancelledError, grpc.RpcError):
            raise
        except Exception as exc:
            await abort(context, unexpected(exc), call.request_id, call.partial)

    async def tokenize(self, request: pb.TokenizeRequest | Malformed, context: Context) -> pb.TokenizeResponse:
        try:
            message = well_formed(request)
            tenant = self._inference.access.tenant(context.invocation_metadata() or ())
            return await self._inference.tokenize(message, tenant)
        except SplitfireError as exc:
            await abort(context, exc, "")
        except (asyncio.CancelledError, grpc.RpcError):
            raise
        except Exception as exc:
            await abort(context, unexpected(exc), "")

    async def list_models(self, request: pb.ListModelsRequest | Malformed, context: Context) -> pb.ListModelsResponse:
        await _refuse_bad_call(request, context)
        model, fingerprint = self._inference.model.limits(), self._fleet.fingerprint
        described = pb.Model(
            id=model.name, context_length=model.context_length, vocab_size=model.vocab_size, has_chat_template=model.has_chat_template,
            fingerprint=fingerprint.digest.hex() if fingerprint is not None else "",
        )  # fmt: skip
        return pb.ListModelsResponse(models=[described])

    async def get_fleet(self, request: pb.GetFleetRequest | Malformed, context: Context) -> pb.GetFleetResponse:
        await _refuse_bad_call(request, context)
        if isinstance(request, pb.GetFleetRequest) and request.measure:
            await self._fleet.measure_pairs()
        response = self._describe(request.last if isinstance(request, pb.GetFleetRequest) else 0)
        response.queued_requests = self._flow.admission.num_queued
        response.running_requests = self._flow.admission.num_running
        return response

    async def get_traces(self, request: pb.GetTracesRequest | Malformed, context: Context) -> pb.GetTracesResponse:
        try:
            message = well_formed(request)
            refuse_unknown_fields(message)
            tenant = self._inference.access.tenant(context.invocation_metadata() or ())
            return pb.GetTracesResponse(traces=self._find_traces(message, None if tenant.is_admin else tenant.name))
        except SplitfireError as exc:
            await abort(context, exc, "")

    def _find_traces(self, asked: pb.GetTracesRequest, tenant: str | None) -> list[pb.RequestTrace]:
        for name, count in (("last", asked.last), ("slowest", asked.slowest)):
            require(count <= MAX_RECENT, name, count, f"at most {MAX_RECENT}")
        require(
            bool(asked.id) + bool(asked.last) + bool(asked.slowest) == 1, "id", asked.id or "empty", "one of id, last and slowest"
        )
        recent = self._recent
        if asked.id:
            found: Sequence[Ended] = recent.find(asked.id, tenant)
        else:
            found = recent.slowest(asked.slowest, tenant) if asked.slowest else recent.latest(asked.last, tenant)
        return [recent.describe(ended) for ended in found]


async def _refuse_bad_call(request: Message | Malformed, context: Context) -> None:
    try:
        refuse_unknown_fields(well_formed(request))
    except SplitfireError as exc:
        await abort(context, exc, "")


def _traceparent(context: Context) -> str:
    values = [value for key, value in context.invocation_metadata() or () if key == "traceparent"]
    return str(values[0]) if len(values) == 1 else ""
