"""One request from its message to its summary, whoever brought it: validated, run, streamed. Event loop only.

`grpc_api.py` and `http_api.py` are doors to this; neither knows the other. Everything that a request started ends with it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import structlog
from tokenizers import Tokenizer

from router.access import Access
from router.choice import Choice, RequestPlan
from router.describe import request_attributes
from router.detokenizer import Detokenizer
from router.ended import CANCELLED, OK, Ended, OnEnded
from router.flow import Flow
from router.formats import FormatPool
from router.quotas import Quotas
from router.stream import ChoiceStream, ClientWriter, summary_of
from router.tenants import Tenant
from router.text import TextPool, TextStream
from splitfire.core import limits
from splitfire.core.errors import AlreadyExists, DeadlineExceeded, SplitfireError, Unavailable
from splitfire.core.telemetry import NO_TRACE, RequestTrace, Telemetry
from splitfire.core.validation import (
    REQUEST_ID,
    ModelLimits,
    ValidRequest,
    check_chat,
    check_predicted,
    check_request,
    check_tokenize_request,
    resolve_stopping,
)
from splitfire.v1 import inference_pb2 as pb

log = structlog.get_logger("router")
Write = Callable[[pb.GenerateResponse], Awaitable[None]]


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


@dataclass(slots=True)
class Call:
    """One request, and what is known of it when it ends: also when it fails."""

    tenant: Tenant
    traceparent: str = ""
    remaining_s: float | None = None  # the client's own deadline; None: it has none
    accepted_at: float = field(default_factory=time.monotonic)
    request_id: str = ""
    streams: list[ChoiceStream] = field(default_factory=list)
    summary: pb.Summary = field(default_factory=pb.Summary)  # when it ends

    @property
    def choices(self) -> list[Choice]:
        return [stream.choice for stream in self.streams]

    @property
    def num_generated(self) -> int:
        """Tokens that workers made, whether the client took them or not."""
        return sum(len(choice.ids) for choice in self.choices)

    @property
    def partial(self) -> dict[str, str]:
        """How much of an answer that failed was streamed before."""
        num_sent = sum(stream.num_sent for stream in self.streams)
        return {"incomplete": "true", "generated_tokens": str(num_sent)} if num_sent else {}


class Inference:
    """`is_draining` refuses new requests."""

    def __init__(
        self, model: ServedModel, tenants: Tenants, flow: Flow, telemetry: Telemetry, on_ended: Sequence[OnEnded] = ()
    ) -> None:
        self.is_draining = False
        self._on_ended = on_ended
        self.model = model
        self.access = tenants.access
        self.detokenizer = Detokenizer(model.tokenizer)
        self._quotas = tenants.quotas
        self._flow = flow
        self._telemetry = telemetry
        self._active: set[tuple[str, str]] = set()  # tenant and request id

    @property
    def num_active(self) -> int:
        return len(self._active)

    async def generate(self, message: pb.GenerateRequest, call: Call, write: Write) -> None:
        """Writes what the choices produce, one message at a time, the summary last. SplitfireError when it ends otherwise."""
        call.request_id = message.request_id if REQUEST_ID.match(message.request_id) else secrets.token_hex(12)
        trace = NO_TRACE
        outcome = CANCELLED
        try:
            valid = check_request(message, self.model.limits())
            if valid.priority > call.tenant.priority:
                valid = replace(valid, priority=call.tenant.priority)
            if valid.priority < message.priority:
                log.info("priority lowered", request_id=call.request_id, asked=message.priority, given=valid.priority)
            trace = self._telemetry.begin_request(call.traceparent, call.accepted_at)
            if trace.trace_id:  # in every line that is logged for it from here on, also by tasks it starts
                structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
            with self._claim(call):
                plan = await self._accept(valid, call, trace)
                self._quotas.spend(call.tenant, len(plan.prompt))
                queued_at = time.monotonic()
                self._telemetry.record("accept", trace.traceparent, call.accepted_at, queued_at)
                await self._stream(plan, valid, call, trace, queued_at, write)
            outcome = OK
        except SplitfireError as exc:
            outcome = exc.reason
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._end(call, trace, outcome)

    def _end(self, call: Call, trace: RequestTrace, outcome: str) -> None:
        """It is over, one way or another."""
        now, summary = time.monotonic(), call.summary
        if not summary.request_id:  # it was interrupted
            summary = summary_of(call.streams) if call.streams else pb.Summary(request_id=call.request_id)
            summary.trace_id = trace.trace_id
        if self._telemetry.is_on:
            self._telemetry.end_request(trace, now, request_attributes(summary, self.model.limits().name, outcome))
        if not self._on_ended:
            return
        ended = Ended(
            tenant=call.tenant.name,
            key_id=call.tenant.key_id,
            model=self.model.limits().name,
            outcome=outcome,
            ended_at=now,
            duration_s=now - call.accepted_at,
            summary=summary,
            prefill_busy_s=sum(choice.timeline.prefill_busy_s for choice in call.choices),
            decode_busy_s=sum(choice.timeline.decode_busy_s for choice in call.choices),
        )
        for tell in self._on_ended:
            tell(ended)

    def max_running(self, tenant: Tenant) -> int | None:
        """Choices of a tenant that may run at once by this router's part of its quota."""
        return self._quotas.part(tenant.max_running)

    async def tokenize(self, message: pb.TokenizeRequest, tenant: Tenant) -> pb.TokenizeResponse:
        """Exactly as `generate` would see it."""
        model = self.model.limits()
        check_tokenize_request(message, model)
        if message.messages:
            ids = await self.model.text.encode_chat(check_chat(message.messages, message.tools, model))
        else:
            ids = await self.model.text.encode(message.text, allow_special=tenant.allow_special)
        return pb.TokenizeResponse(token_ids=ids, context_length=model.context_length)

    # -- one request

    @contextmanager
    def _claim(self, call: Call) -> Iterator[None]:
        """The id is the tenant's for as long as the request is open, and what comes out of its choices counts as the tenant's."""
        if self.is_draining:
            raise Unavailable("this router is shutting down; use another one", reason="draining")
        claim = (call.tenant.name, call.request_id)
        if claim in self._active:
            raise AlreadyExists(
                f"request_id: {call.request_id} is active; draw a new one", reason="duplicate_request_id", field="request_id"
            )
        with self._quotas.opened(call.tenant):
            self._active.add(claim)
            try:
                yield
            finally:
                self._active.discard(claim)
                self._quotas.spend(call.tenant, call.num_generated)

    async def _accept(self, valid: ValidRequest, call: Call, trace: RequestTrace) -> RequestPlan:
        """Text becomes ids, defaults become numbers; from here only ids travel."""
        model, tenant = self.model.limits(), call.tenant
        deadline = time.monotonic() + _time_limit(call.remaining_s)
        if valid.token_ids is not None:
            prompt = valid.token_ids
        elif valid.messages is not None:
            prompt = tuple(await self.model.text.encode_chat(valid.messages))
        else:
            prompt = tuple(await self.model.text.encode(valid.text or "", allow_special=tenant.allow_special))
        stopping = resolve_stopping(valid.stopping, len(prompt), model)
        predicted: tuple[int, ...] = ()
        if valid.predicted_output:
            predicted = tuple(await self.model.text.encode_continuation(valid.predicted_output, "predicted_output"))
            check_predicted(len(predicted), model.context_length)
        grammar = await self.model.formats.compile(valid.response_format) if valid.response_format is not None else None
        sampling = valid.sampling
        if not valid.has_seed:
            sampling = replace(sampling, seed=secrets.randbelow(limits.MAX_SEED))
        return RequestPlan(
            request_id=call.request_id,
            prompt=prompt,
            sampling=sampling,
            stopping=stopping,
            grammar=grammar,
            priority=valid.priority,
            session_id=f"{tenant.name}/{valid.session_id}" if valid.session_id else "",
            traceparent=trace.traceparent,
            accepted_at=call.accepted_at,
            deadline=deadline,
            predicted=predicted,
            tenant=tenant.name,
            weight=tenant.weight,
            max_running=self._quotas.part(tenant.max_running),
            cache_salt=tenant.cache_salt,
        )

    async def _stream(
        self, plan: RequestPlan, valid: ValidRequest, call: Call, trace: RequestTrace, queued_at: float, write: Write
    ) -> None:
        """Runs every choice and sends what they produce; ends with the summary."""
        changed, streams = asyncio.Event(), call.streams
        choices = [Choice(plan, index, changed) for index in range(valid.n)]
        streams.extend(ChoiceStream(c, TextStream(self.detokenizer, valid.stopping.stop_strings)) for c in choices)
        first = self._flow.first_attempt(choices)
        tasks = [asyncio.create_task(self._flow.run(c, first), name=f"flow-{plan.request_id}-{c.index}") for c in choices]
        for task in tasks:
            task.add_done_callback(lambda _task: changed.set())
        try:
            async with ClientWriter(write) as client:
                ended_at = await _send(streams, tasks, changed, client)
                self._telemetry.record("stream", plan.traceparent, choices[0].timeline.first_token_at or queued_at, ended_at)
                call.summary = summary_of(streams)
                call.summary.model, call.summary.trace_id = self.model.limits().name, trace.trace_id
                await client.write(pb.GenerateResponse(summary=call.summary))
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
                ended_at = time.monotonic()  # of this process's part: the client may have it before the write returns
                stream.choice.timeline.sent(stream.num_sent, ended_at)
                await client.write(response)
        for task in over:
            task.result()
        if len(over) == len(tasks) and all(s.is_finished for s in streams):
            return ended_at
        await changed.wait()


def _time_limit(remaining_s: float | None) -> float:
    """Seconds the request has: the client's deadline, within the server's own bounds."""
    if remaining_s is None:
        return limits.DEFAULT_DEADLINE_S
    if remaining_s <= 0:
        raise DeadlineExceeded("the deadline had passed when the request arrived", reason="accept")
    return min(remaining_s, limits.MAX_DEADLINE_S)
