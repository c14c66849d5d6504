"""The public gRPC service: parse, validate, run, stream. One handler per call; everything it started ends with it.

Only this file and `http_api.py` (later) see clients. Messages are parsed here, not by the generated code, so that bytes
that are no message get an honest INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from tokenizers import Tokenizer

from router.access import Access
from router.choice import Choice, RequestPlan
from router.describe import Describer
from router.detokenizer import Detokenizer
from router.fleet import Fleet
from router.flow import Flow
from router.formats import FormatPool
from router.messages import Malformed, parser, serialize, well_formed
from router.quotas import Quotas
from router.status import abort, unexpected
from router.stream import ChoiceStream, ClientWriter, summary_of
from router.tenants import Tenant
from router.text import TextPool, TextStream
from splitfire.core import limits
from splitfire.core.errors import AlreadyExists, DeadlineExceeded, SplitfireError, Unavailable
from splitfire.core.telemetry import RequestTrace, Telemetry
from splitfire.core.validation import (
    REQUEST_ID,
    ModelLimits,
    ValidRequest,
    check_messages,
    check_predicted,
    check_request,
    check_tokenize_request,
    refuse_unknown_fields,
    resolve_stopping,
)
from splitfire.v1 import inference_pb2 as pb

log = structlog.get_logger("router")
SERVICE = "splitfire.v1.Inference"
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it; `limits` changes as workers come and go."""

    limits: Callable[[], ModelLimits]
    tokenizer: Tokenizer
    text: TextPool
    formats: FormatPool


@dataclass(frozen=True, slots=True)
class Tenants:
    """Whose calls these are, and what they may still use."""

    access: Access
    quotas: Quotas


class InferenceApi:
    """`splitfire.v1.Inference`. `is_draining` refuses new requests."""

    def __init__(
        self, model: ServedModel, tenants: Tenants, fleet: Fleet, flow: Flow, telemetry: Telemetry, describe: Describer
    ) -> None:
        self.is_draining = False
        self._model = model
        self._tenants = tenants
        self._fleet = fleet
        self._flow = flow
        self._telemetry = telemetry
        self._describe = describe
        self._detokenizer = Detokenizer(model.tokenizer)
        self._active: set[tuple[str, str]] = set()  # tenant and request id

    @property
    def num_active(self) -> int:
        return len(self._active)

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the server registers instead of the generated servicer."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self.generate, parser(pb.GenerateRequest), serialize),
            "Tokenize": unary(self.tokenize, parser(pb.TokenizeRequest), serialize),
            "ListModels": unary(self.list_models, parser(pb.ListModelsRequest), serialize),
            "GetFleet": unary(self.get_fleet, parser(pb.GetFleetRequest), serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: pb.GenerateRequest | Malformed, context: Context) -> None:
        accepted_at = time.monotonic()
        request_id = ""
        trace = RequestTrace(None)
        choices: list[Choice] = []
        try:
            message = well_formed(request)
            tenant = self._tenants.access.tenant(context.invocation_metadata() or ())
            request_id = message.request_id if REQUEST_ID.match(message.request_id) else secrets.token_hex(12)
            valid = check_request(message, self._model.limits())
            if valid.priority > tenant.priority:
                valid = replace(valid, priority=tenant.priority)
            if valid.priority < message.priority:
                log.info("priority lowered", request_id=request_id, asked=message.priority, given=valid.priority)
            trace = self._telemetry.begin_request(_traceparent(context), accepted_at)
            with self._claim(tenant, request_id, choices):
                plan = await self._accept(valid, tenant, request_id, trace, accepted_at, context)
                self._tenants.quotas.spend(tenant, len(plan.prompt))
                queued_at = time.monotonic()
                self._telemetry.record("accept", trace.traceparent, accepted_at, queued_at, {"splitfire.request_id": request_id})
                await self._stream(plan, valid, choices, trace, queued_at, context)
        except SplitfireError as exc:
            await abort(context, exc, request_id, _partial(choices))
        except (asyncio.CancelledError, grpc.RpcError):
            raise
        except Exception as exc:
            await abort(context, unexpected(exc), request_id, _partial(choices))
        finally:
            generated = sum(len(c.ids) for c in choices)
            attributes: dict[str, str | int | float | bool] = {
                "splitfire.request_id": request_id,
                "gen_ai.operation.name": "generate",
                "gen_ai.usage.output_tokens": generated,
            }
            self._telemetry.end_request(trace, time.monotonic(), attributes)

    async def tokenize(self, request: pb.TokenizeRequest | Malformed, context: Context) -> pb.TokenizeResponse:
        try:
            message = well_formed(request)
            model = self._model.limits()
            check_tokenize_request(message, model)
            if message.messages:
                ids = await self._model.text.encode_chat(check_messages(message.messages, model))
            else:
                tenant = self._tenants.access.tenant(context.invocation_metadata() or ())
                ids = await self._model.text.encode(message.text, allow_special=tenant.allow_special)
            return pb.TokenizeResponse(token_ids=ids, context_length=model.context_length)
        except SplitfireError as exc:
            await abort(context, exc, "")
        except (asyncio.CancelledError, grpc.RpcError):
            raise
        except Exception as exc:
            await abort(context, unexpected(exc), "")

    async def list_models(self, request: pb.ListModelsRequest | Malformed, context: Context) -> pb.ListModelsResponse:
        await _refuse_bad_call(request, context)
        model, fingerprint = self._model.limits(), self._fleet.fingerprint
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

    # -- one request

    @contextmanager
    def _claim(self, tenant: Tenant, request_id: str, choices: list[Choice]) -> Iterator[None]:
        """The id is the tenant's for as long as the request is open, and what comes out of its choices counts as the tenant's."""
        if self.is_draining:
            raise Unavailable("this router is shutting down; use another one", reason="draining")
        claim = (tenant.name, request_id)
        if claim in self._active:
            raise AlreadyExists(
                f"request_id: {request_id} is active; draw a new one", reason="duplicate_request_id", field="request_id"
            )
        quotas = self._tenants.quotas
        with quotas.opened(tenant):
            self._active.add(claim)
            try:
                yield
            finally:
                self._active.discard(claim)
                quotas.spend(tenant, sum(len(choice.ids) for choice in choices))

    async def _accept(
        self, valid: ValidRequest, tenant: Tenant, request_id: str, trace: RequestTrace, accepted_at: float, context: Context
    ) -> RequestPlan:
        """Text becomes ids, defaults become numbers; from here only ids travel."""
        model = self._model.limits()
        deadline = accepted_at + _time_limit(context)
        if valid.token_ids is not None:
            prompt = valid.token_ids
        elif valid.messages is not None:
            prompt = tuple(await self._model.text.encode_chat(valid.messages))
        else:
            prompt = tuple(await self._model.text.encode(valid.text or "", allow_special=tenant.allow_special))
        stopping = resolve_stopping(valid.stopping, len(prompt), model)
        predicted: tuple[int, ...] = ()
        if valid.predicted_output:
            predicted = tuple(await self._model.text.encode_continuation(valid.predicted_output, "predicted_output"))
            check_predicted(len(predicted), model.context_length)
        grammar = await self._model.formats.compile(valid.response_format) if valid.response_format is not None else None
        sampling = valid.sampling
        if not valid.has_seed:
            sampling = replace(sampling, seed=secrets.randbelow(limits.MAX_SEED))
        return RequestPlan(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            stopping=stopping,
            grammar=grammar,
            priority=valid.priority,
            session_id=f"{tenant.name}/{valid.session_id}" if valid.session_id else "",
            traceparent=trace.traceparent,
            accepted_at=accepted_at,
            deadline=deadline,
            predicted=predicted,
            tenant=tenant.name,
            weight=tenant.weight,
            max_running=self._tenants.quotas.part(tenant.max_running),
            cache_salt=tenant.cache_salt,
        )

    async def _stream(
        self, plan: RequestPlan, valid: ValidRequest, choices: list[Choice], trace: RequestTrace, queued_at: float, context: Context
    ) -> None:
        """Runs every choice and sends what they produce; ends with the summary."""
        changed = asyncio.Event()
        choices.extend(Choice(plan, index, changed) for index in range(valid.n))
        streams = [ChoiceStream(c, TextStream(self._detokenizer, valid.stopping.stop_strings)) for c in choices]
        first = self._flow.first_attempt(choices)
        tasks = [asyncio.create_task(self._flow.run(c, first), name=f"flow-{plan.request_id}-{c.index}") for c in choices]
        for task in tasks:
            task.add_done_callback(lambda _task: changed.set())
        try:
            async with ClientWriter(context.write) as client:
                ended_at = await _send(streams, tasks, changed, client)
                self._telemetry.record("stream", plan.traceparent, choices[0].timeline.first_token_at or queued_at, ended_at)
                summary = summary_of(choices, streams, queued_at, ended_at)
                summary.model, summary.trace_id = self._model.limits().name, trace.trace_id
                await client.write(pb.GenerateResponse(summary=summary))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _send(
    streams: Sequence[ChoiceStream], tasks: Sequence[asyncio.Task[None]], changed: asyncio.Event, client: ClientWriter
) -> float:
    """Until every choice is finished and sent; when the last message went. Raises the first error of a choice."""
    ended_at = 0.0
    while True:
        changed.clear()
        over = [t for t in tasks if t.done()]
        for stream in streams:
            response = stream.take()
            if response is not None:
                await client.write(response)
                ended_at = time.monotonic()
        for task in over:
            task.result()
        if len(over) == len(tasks) and all(s.is_finished for s in streams):
            return ended_at
        await changed.wait()


async def _refuse_bad_call(request: Message | Malformed, context: Context) -> None:
    try:
        refuse_unknown_fields(well_formed(request))
    except SplitfireError as exc:
        await abort(context, exc, "")


def _traceparent(context: Context) -> str:
    values = [value for key, value in context.invocation_metadata() or () if key == "traceparent"]
    return str(values[0]) if len(values) == 1 else ""


def _time_limit(context: Context) -> float:
    """Seconds the request has: the client's deadline, within the server's own bounds."""
    remaining: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
    if remaining is None:
        return limits.DEFAULT_DEADLINE_S
    if remaining <= 0:
        raise DeadlineExceeded("the deadline had passed when the request arrived", reason="accept")
    return min(remaining, limits.MAX_DEADLINE_S)


def _partial(choices: list[Choice]) -> dict[str, str]:
    """How much of an answer that failed was streamed before."""
    generated = sum(len(choice.ids) for choice in choices)
    return {"incomplete": "true", "generated_tokens": str(generated)} if generated else {}
