"""The HTTP door to `inference.py`: OpenAI's API, and a page to try it. Every path is refused unless `access.py` names it.

A handler reads its whole body within bounds, runs, and answers once or as server-sent events. A client that goes away cancels its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.types import Receive, Scope, Send

from router.access import NEEDS, Need
from router.completions import Asked, Completions
from router.http_server import ABORT
from router.inference import Call, Inference
from router.openai.answers import Answer
from router.openai.errors import http_error
from router.openai.requests import DetokenizeBody, TokenizeBody, read
from router.playground import CONTENT_TYPE, read_page
from router.status import log_internal, unexpected
from router.tenants import Tenant
from splitfire.core import limits
from splitfire.core.errors import Forbidden, InvalidInput, NotFound, SplitfireError, Unavailable
from splitfire.core.ranges import check_token_ids, require
from splitfire.core.strict_json import parse_object
from splitfire.core.validation import check_model
from splitfire.v1 import inference_pb2 as pb

JSON, EVENTS = b"application/json", b"text/event-stream"
BODY_S = 30.0  # that a body may take to come
LAST_WORD_S = 2.0
READ_ON_BYTES = 8 * limits.MAX_MESSAGE_BYTES  # of a body that is too large: who is cut off while he sends does not see why
SKIP_S = 5.0
MODELS = "/v1/models"
WITH_IDS = ("files", "batches")
FILE_PATHS: Mapping[str, tuple[str, ...]] = {
    "/v1/files": ("GET", "POST"),
    "/v1/files/*": ("GET", "DELETE"),
    "/v1/files/*/content": ("GET",),
    "/v1/batches": ("GET", "POST"),
    "/v1/batches/*": ("GET",),
    "/v1/batches/*/cancel": ("POST",),
}
Handler = Callable[["Exchange"], Awaitable[None]]
Routes = Mapping[str, Mapping[str, Handler]]  # by path and method


class Gone(Exception):
    """The client went away before it had said everything."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.query: bytes = scope.get("query_string", b"")
        self.arrived_at = time.monotonic()  # its body may still be on the way
        self.has_begun = False
        self.tenant: Tenant | None = None
        self._is_whole = not self.header("transfer-encoding") and self.header("content-length") in ("", "0")  # nothing more comes
        self._loop = asyncio.get_running_loop()
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
        return parse_object(b"".join([piece async for piece in self.pieces(limits.MAX_MESSAGE_BYTES, BODY_S)]))

    async def pieces(self, max_bytes: int, most_s: float) -> AsyncIterator[bytes]:
        """The body as it comes. InvalidInput when it is longer, or takes longer, or stands still for BODY_S."""
        size, deadline = 0, self._loop.time() + most_s
        while not self._is_whole:
            try:
                async with asyncio.timeout(min(BODY_S, deadline - self._loop.time())):
                    message = await self._receive()
            except TimeoutError as exc:
                raise InvalidInput("body", f"did not come within {most_s:g} s", reason="body_timeout") from exc
            if message["type"] == "http.disconnect":
                raise Gone
            piece, self._is_whole = message.get("body", b""), not message.get("more_body")
            size += len(piece)
            if size <= max_bytes:
                yield piece
            elif self._is_whole or size > max_bytes + READ_ON_BYTES:
                raise InvalidInput("body", f"is larger than {max_bytes} bytes", reason="body_too_large")

    async def skip_body(self) -> None:
        """What is still to come, within bounds: who is cut off while he sends does not see why."""
        with contextlib.suppress(InvalidInput):
            async for _ in self.pieces(READ_ON_BYTES, SKIP_S):
                pass

    async def begin(self, status: int, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        fixed = [(b"content-type", content_type), (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
        if not self._is_whole:  # what is still sent is nobody's
            fixed.append((b"connection", b"close"))
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
            self.abort()

    def abort(self) -> None:
        """Ends the connection: what was begun cannot be ended otherwise."""
        self._abort()

    async def gone(self) -> None:
        """Returns when the client is."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class HttpApi:
    """An ASGI application."""

    def __init__(
        self,
        inference: Inference,
        fingerprint: Callable[[], str],
        can_serve: Callable[[], bool],
        *,
        is_loopback: bool,
        files: Routes | None = None,  # of FILE_PATHS; None: they are off
    ) -> None:
        self._inference = inference
        self._completions = Completions(inference, fingerprint)
        self._can_serve = can_serve
        self._is_loopback = is_loopback  # only this machine reaches the port
        self._created = int(time.time())
        self._page = read_page()
        self._routes: dict[str, Mapping[str, Handler]] = {
            "/": {"GET": self._playground, "HEAD": self._playground},
            "/health": {"GET": self._health},
            MODELS: {"GET": self._models},
            MODELS + "/*": {"GET": self._model},
            "/v1/chat/completions": {"POST": self._complete},
            "/v1/completions": {"POST": self._complete},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            **(files or {path: dict.fromkeys(methods, _without_files) for path, methods in FILE_PATHS.items()}),
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
        if self._is_loopback and _place(f"//{host}").hostname not in ("localhost", "127.0.0.1", "::1"):
            raise Forbidden("Host: this port is for this machine; ask for localhost", reason="foreign_host")
        if any(name == "origin" for name, _ in exchange.headers) and _place(origin).netloc.lower() != host.lower():
            raise Forbidden("Origin: pages from elsewhere may not use this server", reason="foreign_origin")

    def _admit(self, exchange: Exchange) -> Handler:
        """The handler of a path, for whom it is."""
        path = _pattern(exchange.path)
        methods = self._routes.get(path)
        access = self._inference.access
        access.check(path, exchange.headers)
        if methods is None:
            raise NotFound(f"there is nothing at {exchange.path[:80]!a}", reason="not_found")
        handler = methods.get(exchange.method)
        if handler is None:
            raise InvalidInput("method", f"is {exchange.method[:20]}, accepted: {', '.join(methods)}", reason="method_not_allowed")
        if NEEDS.get(path) is not Need.NOTHING:
            exchange.tenant = access.tenant(exchange.headers)
        return handler

    # -- what can be asked

    async def _health(self, exchange: Exchange) -> None:
        if not self._can_serve():
            raise Unavailable("no worker can take a request now", reason="not_serving", retry_after_s=1.0)
        await exchange.answer(b'{"status": "ok"}')

    async def _playground(self, exchange: Exchange) -> None:
        await exchange.begin(200, CONTENT_TYPE, self._page.headers)
        await exchange.write(self._page.body, is_last=True)  # of a HEAD the server sends the head alone

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

    async def _complete(self, exchange: Exchange) -> None:
        """A chat or a completion: runs it until it ends or the client goes."""
        asked = self._completions.read(exchange.path, await exchange.body())
        call = Call(_tenant(exchange), exchange.header("traceparent"), accepted_at=exchange.arrived_at)
        answering = asyncio.create_task(_answer(exchange, asked, call))
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

    def _described(self) -> dict[str, object]:
        model = self._inference.model.limits()
        return {
            "id": model.name, "object": "model", "created": self._created, "owned_by": "splitfire",
            "max_model_len": model.context_length,
        }  # fmt: skip


def _pattern(path: str) -> str:
    """The path with `*` for what it names."""
    if path.startswith(MODELS + "/"):
        return MODELS + "/*"
    parts = path.split("/")
    if len(parts) > 3 and parts[1] == "v1" and parts[2] in WITH_IDS and parts[3]:
        parts[3] = "*"
    return "/".join(parts)


async def _without_files(_exchange: Exchange) -> None:
    message = "files and batches are off here: they need a directory to be kept in; start the router with --files-dir PATH"
    raise NotFound(message, reason="files_off")


async def _answer(exchange: Exchange, asked: Asked, call: Call) -> None:
    """Whole, or as it comes."""
    if not asked.is_stream:
        whole = await asked.whole(call)
        await exchange.answer(whole.body, headers=((b"x-request-id", call.request_id.encode()),))
        return
    answer: Answer | None = None

    async def write(response: pb.GenerateResponse) -> None:
        nonlocal answer
        if answer is None:
            answer = asked.make(call)
            await exchange.begin(200, EVENTS, ((b"x-request-id", call.request_id.encode()),))
        is_summary = response.HasField("summary")
        await exchange.write(answer.last_chunk(response.summary) if is_summary else answer.chunk(response), is_last=is_summary)

    await asked.run(call, write)


def _tenant(exchange: Exchange) -> Tenant:
    assert exchange.tenant is not None, "every handler of a path that needs a key has one"
    return exchange.tenant


def _place(url: str) -> SplitResult:
    """Nowhere where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
