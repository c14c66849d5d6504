"""The HTTP door to `inference.py`: OpenAI's API. Every path is refused unless `access.py` names it.

A handler reads its whole body within bounds, runs, and answers once or as server-sent events. A client that goes away cancels its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Receive, Scope, Send

from router.http_server import ABORT
from router.inference import Call, Inference
from router.openai.answers import Answer, ChatAnswer, CompletionAnswer
from router.openai.errors import http_error
from router.openai.json_body import parse_object
from router.openai.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, read
from router.openai.tools import Plain, Reader
from router.status import log_internal, unexpected
from router.tenants import Tenant
from splitfire.core import limits
from splitfire.core.errors import Forbidden, InvalidInput, NotFound, SplitfireError, Unavailable
from splitfire.core.ranges import check_token_ids, require
from splitfire.core.validation import check_model
from splitfire.v1 import inference_pb2 as pb

JSON, EVENTS = b"application/json", b"text/event-stream"
BODY_S = 30.0  # that a body may take to come
LAST_WORD_S = 2.0
READ_ON_BYTES = 8 * limits.MAX_MESSAGE_BYTES  # of a body that is too large: who is cut off while he sends does not see why
MODELS = "/v1/models"
Handler = Callable[["Exchange"], Awaitable[None]]


class Gone(Exception):
    """The client went away before it had said everything."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.has_begun = False
        self.tenant: Tenant | None = None
        self._receive = receive
        self._send = send
        self._abort: Callable[[], None] = scope.get("state", {}).get(ABORT, lambda: None)

    def header(self, name: str) -> str:
        """Empty where it is missing, or there more than once."""
        values = [value for key, value in self.headers if key == name]
        return values[0] if len(values) == 1 else ""

    async def body(self) -> dict[str, Any]:
        """The JSON object that was sent, of at most MAX_REQUEST_BYTES."""
        if self.header("content-type").split(";")[0].strip().lower() != "application/json":
            raise InvalidInput("body", "must be application/json, by its Content-Type", reason="content_type")
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part, is_last = message.get("body", b""), not message.get("more_body")
                    size += len(part)
                    if size <= limits.MAX_MESSAGE_BYTES:
                        parts.append(part)
                    elif is_last or size > READ_ON_BYTES:
                        raise InvalidInput("body", f"is larger than {limits.MAX_MESSAGE_BYTES} bytes", reason="body_too_large")
                    if is_last:
                        return parse_object(b"".join(parts))
        except TimeoutError as exc:
            raise InvalidInput("body", f"did not come within {BODY_S:g} s", reason="body_timeout") from exc

    async def begin(self, status: int, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        fixed = ((b"content-type", content_type), (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def answer(self, data: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """All of it at once."""
        await self.begin(status, JSON, ((b"content-length", str(len(data)).encode()), *headers))
        await self.write(data, is_last=True)

    async def fail(self, error: SplitfireError, request_id: str = "", partial: dict[str, str] | None = None) -> None:
        """As a status where none was sent yet, else as the last event."""
        error_id = log_internal(error, request_id)
        made = http_error(error, request_id, {**(partial or {}), **error_id})
        try:
            async with asyncio.timeout(LAST_WORD_S):
                if self.has_begun:
                    await self.write(b"data: " + made.body + b"\n\n", is_last=True)
                else:
                    await self.answer(made.body, made.status, made.headers)
        except TimeoutError:  # who does not read is not told why
            self._abort()

    async def gone(self) -> None:
        """Returns when the client is."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class HttpApi:
    """An ASGI application."""

    def __init__(
        self, inference: Inference, fingerprint: Callable[[], str], can_serve: Callable[[], bool], *, is_loopback: bool
    ) -> None:
        self._inference = inference
        self._fingerprint = fingerprint
        self._can_serve = can_serve
        self._is_loopback = is_loopback  # only this machine reaches the port
        self._created = int(time.time())
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            MODELS: {"GET": self._models},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._complete},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            self._check_origin(exchange)
            handler = self._admit(exchange)
            await handler(exchange)
        except Gone:
            return
        except SplitfireError as exc:
            await exchange.fail(exc)
        except Exception as exc:
            await exchange.fail(unexpected(exc))

    # -- who may ask what

    def _check_origin(self, exchange: Exchange) -> None:
        """A page from elsewhere may not use this port through somebody's browser (B49)."""
        host, origin = exchange.header("host"), exchange.header("origin")
        if self._is_loopback and urlsplit(f"//{host}").hostname not in ("localhost", "127.0.0.1", "::1"):
            raise Forbidden("Host: this port is for this machine; ask for localhost", reason="foreign_host")
        if any(name == "origin" for name, _ in exchange.headers) and urlsplit(origin).netloc.lower() != host.lower():
            raise Forbidden("Origin: pages from elsewhere may not use this server", reason="foreign_origin")

    def _admit(self, exchange: Exchange) -> Handler:
        """The handler of a path, for whom it is."""
        path = MODELS + "/*" if exchange.path.startswith(MODELS + "/") else exchange.path
        methods = {"GET": self._model} if path == MODELS + "/*" else self._routes.get(path)
        access = self._inference.access
        access.check(path, exchange.headers)
        if methods is None:
            raise NotFound(f"there is nothing at {exchange.path[:80]!a}", reason="not_found")
        handler = methods.get(exchange.method)
        if handler is None:
            raise InvalidInput("method", f"is {exchange.method[:20]}, accepted: {', '.join(methods)}", reason="method_not_allowed")
        if path != "/health":
            exchange.tenant = access.tenant(exchange.headers)
        return handler

    # -- what can be asked

    async def _health(self, exchange: Exchange) -> None:
        if not self._can_serve():
            raise Unavailable("no worker can take a request now", reason="not_serving", retry_after_s=1.0)
        await exchange.answer(b'{"status": "ok"}')

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps({"object": "list", "data": [self._described()]}).encode())

    async def _model(self, exchange: Exchange) -> None:
        check_model(exchange.path.removeprefix(MODELS + "/"), self._inference.model.limits())
        await exchange.answer(json.dumps(self._described()).encode())

    async def _tokenize(self, exchange: Exchange) -> None:
        request = read(TokenizeBody, await exchange.body()).request()
        made = await self._inference.tokenize(request, _tenant(exchange))
        ids = list(made.token_ids)
        await exchange.answer(json.dumps({"count": len(ids), "max_model_len": made.context_length, "tokens": ids}).encode())

    async def _detokenize(self, exchange: Exchange) -> None:
        asked, model = read(DetokenizeBody, await exchange.body()), self._inference.model.limits()
        check_model(asked.model, model)
        require(len(asked.tokens) <= model.context_length, "tokens", f"{len(asked.tokens)} ids", f"at most {model.context_length}")
        check_token_ids("tokens", asked.tokens, model.vocab_size)
        text = self._inference.detokenizer.begin()
        await exchange.answer(json.dumps({"prompt": text.push(asked.tokens) + text.flush()}).encode())

    async def _chat(self, exchange: Exchange) -> None:
        asked = read(ChatBody, await exchange.body())
        make = partial(self._begin, ChatAnswer, "chatcmpl", asked.reader, has_usage=asked.has_usage)
        await self._generate(exchange, asked.request(), make, is_stream=bool(asked.stream))

    async def _complete(self, exchange: Exchange) -> None:
        asked = read(CompletionBody, await exchange.body())
        make = partial(self._begin, CompletionAnswer, "cmpl", Plain, has_usage=asked.has_usage)
        await self._generate(exchange, asked.request(), make, is_stream=bool(asked.stream))

    def _begin(
        self, kind: type[Answer], prefix: str, make_reader: Callable[[], Reader], request_id: str, *, has_usage: bool
    ) -> Answer:
        name, piece = self._inference.model.limits().name, self._inference.detokenizer.piece
        return kind(f"{prefix}-{request_id}", name, int(time.time()), self._fingerprint(), piece, make_reader, has_usage=has_usage)

    async def _generate(
        self, exchange: Exchange, request: pb.GenerateRequest, make: Callable[[str], Answer], *, is_stream: bool
    ) -> None:
        """Runs it until it ends or the client goes."""
        call = Call(_tenant(exchange), exchange.header("traceparent"))
        answering = asyncio.create_task(self._answer(exchange, request, call, make, is_stream=is_stream))
        leaving = asyncio.create_task(exchange.gone())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
        try:
            if not answering.cancelled():
                answering.result()
        except SplitfireError as exc:
            await exchange.fail(exc, call.request_id, call.partial)
        except Exception as exc:
            await exchange.fail(unexpected(exc), call.request_id, call.partial)

    async def _answer(
        self, exchange: Exchange, request: pb.GenerateRequest, call: Call, make: Callable[[str], Answer], *, is_stream: bool
    ) -> None:
        answer: Answer | None = None

        async def write(response: pb.GenerateResponse) -> None:
            nonlocal answer
            if answer is None:
                answer = make(call.request_id)
                if is_stream:
                    await exchange.begin(200, EVENTS, ((b"x-request-id", call.request_id.encode()),))
            is_summary = response.HasField("summary")
            if is_stream:
                await exchange.write(
                    answer.last_chunk(response.summary) if is_summary else answer.chunk(response), is_last=is_summary
                )
            elif is_summary:
                await exchange.answer(answer.whole(response.summary), headers=((b"x-request-id", call.request_id.encode()),))
            else:
                answer.take(response)

        await self._inference.generate(request, call, write)

    def _described(self) -> dict[str, object]:
        model = self._inference.model.limits()
        return {
            "id": model.name, "object": "model", "created": self._created, "owned_by": "splitfire",
            "max_model_len": model.context_length,
        }  # fmt: skip


def _tenant(exchange: Exchange) -> Tenant:
    assert exchange.tenant is not None, "every handler but health's has one"
    return exchange.tenant
