"""The public gRPC service: parse, validate, run, stream. One handler per call; everything it started ends with it.

Only this file and `http_api.py` (later) see clients. Messages are parsed here, not by the generated code, so that bytes
that are no message get an honest INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from tokenizers import Tokenizer

from router.choice import Choice, RequestPlan
from router.fleet import Fleet
from router.flow import Flow
from router.formats import FormatPool
from router.status import abort, unexpected
from router.stream import ChoiceStream, summary_of
from router.text import TextPool, TextStream
from splitfire.core import limits
from splitfire.core.errors import AlreadyExists, DeadlineExceeded, Exhausted, InvalidInput, SplitfireError, Unavailable
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
Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not the message the method takes."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it; `limits` changes as workers come and go."""

    limits: Callable[[], ModelLimits]
    tokenizer: Tokenizer
    text: TextPool
    formats: FormatPool


class InferenceApi:
    """`splitfire.v1.Inference`. `is_draining` refuses new requests."""

    def __init__(self, model: ServedModel, fleet: Fleet, flow: Flow, telemetry: Telemetry, worker_ports: list[str]) -> None:
        self.is_draining = False
        self._model = model
        self._fleet = fleet
        self._flow = flow
        self._telemetry = telemetry
        self._worker_ports = worker_ports
        self._active: set[str] = set()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the server registers instead of the generated servicer."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self.generate, _parser(pb.GenerateRequest), _serialize),
            "Tokenize": unary(self.tokenize, _parser(pb.TokenizeRequest), _serialize),
            "ListModels": unary(self.list_models, _parser(pb.ListModelsRequest), _serialize),
            "GetFleet": unary(self.get_fleet, _parser(pb.GetFleetRequest), _serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(self, request: pb.GenerateRequest | Malformed, context: Context) -> None:
        accepted_at = time.monotonic()
        request_id = ""
        trace = RequestTrace(None)
        choices: list[Choice] = []
        try:
            message = _well_formed(request)
            request_id = message.request_id if REQUEST_ID.match(message.request_id) else secrets.token_hex(12)
            valid = check_request(message, self._model.limits())
            if valid.priority < message.priority:
                log.info("priority lowered", request_id=request_id, asked=message.priority, given=valid.priority)
            trace = self._telemetry.begin_request(_traceparent(context), accepted_at)
            self._claim(request_id)
            try:
                plan = await self._accept(valid, request_id, trace, accepted_at, context)
                queued_at = time.monotonic()
                self._telemetry.record("accept", trace.traceparent, accepted_at, queued_at, {"splitfire.request_id": request_id})
                await self._stream(plan, valid, choices, trace, queued_at, context)
            finally:
                self._active.discard(request_id)
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
            message = _well_formed(request)
            model = self._model.limits()
            check_tokenize_request(message, model)
            if message.messages:
                ids = await self._model.text.encode_chat(check_messages(message.messages, model))
            else:
                ids = await self._model.text.encode(message.text)
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
        response = self._fleet.describe()
        response.worker_ports.extend(self._worker_ports)
        response.queued_requests = self._flow.admission.num_queued
        response.running_requests = self._flow.admission.num_running
        return response

    # -- one request

    def _claim(self, request_id: str) -> None:
        if self.is_draining:
            raise Unavailable("this router is shutting down; use another one", reason="draining")
        if request_id in self._active:
            raise AlreadyExists(
                f"request_id: {request_id} is active; draw a new one", reason="duplicate_request_id", field="request_id"
            )
        self._active.add(request_id)

    async def _accept(
        self, valid: ValidRequest, request_id: str, trace: RequestTrace, accepted_at: float, context: Context
    ) -> RequestPlan:
        """Text becomes ids, defaults become numbers; from here only ids travel."""
        model = self._model.limits()
        deadline = accepted_at + _time_limit(context)
        if valid.token_ids is not None:
            prompt = valid.token_ids
        elif valid.messages is not None:
            prompt = tuple(await self._model.text.encode_chat(valid.messages))
        else:
            prompt = tuple(await self._model.text.encode(valid.text or ""))
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
            session_id=valid.session_id,
            traceparent=trace.traceparent,
            accepted_at=accepted_at,
            deadline=deadline,
            predicted=predicted,
        )

    async def _stream(
        self, plan: RequestPlan, valid: ValidRequest, choices: list[Choice], trace: RequestTrace, queued_at: float, context: Context
    ) -> None:
        """Runs every choice and sends what they produce; ends with the summary."""
        changed = asyncio.Event()
        choices.extend(Choice(plan, index, changed) for index in range(valid.n))
        streams = [ChoiceStream(c, TextStream(self._model.tokenizer, valid.stopping.stop_strings)) for c in choices]
        first = self._flow.first_attempt(choices)
        tasks = [asyncio.create_task(self._flow.run(c, first), name=f"flow-{plan.request_id}-{c.index}") for c in choices]
        for task in tasks:
            task.add_done_callback(lambda _task: changed.set())
        ended_at = 0.0
        try:
            while True:
                changed.clear()
                over = [t for t in tasks if t.done()]
                for stream in streams:
                    response = stream.take()
                    if response is not None:
                        await self._write(context, response)
                        ended_at = time.monotonic()
                for task in over:
                    task.result()  # the first error ends the request
                if all(s.is_finished for s in streams) and len(over) == len(tasks):
                    break
                await changed.wait()
            self._telemetry.record("stream", plan.traceparent, choices[0].timeline.first_token_at or queued_at, ended_at)
            summary = summary_of(choices, streams, queued_at, ended_at)
            summary.model, summary.trace_id = self._model.limits().name, trace.trace_id
            await self._write(context, pb.GenerateResponse(summary=summary))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, context: Context, response: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(limits.SLOW_CLIENT_S):
                await context.write(response)
        except TimeoutError as exc:
            raise Exhausted(f"the client read nothing for {limits.SLOW_CLIENT_S:g} s", reason="slow_consumer") from exc


def _parser(kind: type[Request]) -> Callable[[bytes], Request | Malformed]:
    def parse(data: bytes) -> Request | Malformed:
        try:
            return kind.FromString(data)
        except (DecodeError, RecursionError):
            return Malformed()

    return parse


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _well_formed(request: Request | Malformed) -> Request:
    if isinstance(request, Malformed):
        raise InvalidInput(
            "request", "is not a valid message: wrong wire types, or text that is not UTF-8", reason="invalid_message"
        )
    return request


async def _refuse_bad_call(request: Message | Malformed, context: Context) -> None:
    try:
        refuse_unknown_fields(_well_formed(request))
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
