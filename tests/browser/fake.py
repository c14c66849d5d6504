"""A router that answers what a test wrote down: the real page at `/`, behind it a script. In a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from types import SimpleNamespace
from typing import Any

from starlette.types import Receive, Scope, Send

from router.access import Access
from router.http_api import HttpApi
from router.http_server import HttpServer

Event = dict[str, Any] | bytes | None  # of a stream; bytes are sent as they are
HOLD = None  # the stream goes on when the test says so
WAIT_S = 20.0


@dataclass
class Plot:
    """What the next request gets."""

    events: Sequence[Event] = ()
    status: int = 200
    error: dict[str, Any] | None = None  # with another status


@dataclass
class FakeRouter:
    """`plot` may be set at any time, `asked` read; what else there is belongs to the thread."""

    origin: str = ""
    model: str = "fake"
    plot: Plot = field(default_factory=Plot)
    asked: list[dict[str, Any]] = field(default_factory=list)  # path, authorization, body
    has_lost_client: threading.Event = field(default_factory=threading.Event)
    _go_on: threading.Event = field(default_factory=threading.Event)
    _page: HttpApi | None = None

    def go_on(self) -> None:
        self._go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        assert self._page is not None
        if not path.startswith("/v1/"):
            await self._page(scope, receive, send)
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append(
            {"path": path, "authorization": headers.get("authorization", ""), "body": json.loads(body) if body else None}
        )
        if path == "/v1/models":
            await _answer(send, 200, {"data": [{"id": self.model, "max_model_len": 2048}]})
        elif self.plot.error is not None:
            await _answer(send, self.plot.status, {"error": self.plot.error})
        else:
            await self._stream(receive, send)

    async def _stream(self, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for event in self.plot.events:
            if event is HOLD:
                going_on = asyncio.create_task(asyncio.to_thread(self._go_on.wait, WAIT_S))
                await asyncio.wait((going_on, leaving), return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    self.has_lost_client.set()
                    self._go_on.set()
                await going_on
                self._go_on.clear()
                continue
            data = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        leaving.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(send: Send, status: int, said: dict[str, Any]) -> None:
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def fake_router() -> Iterator[FakeRouter]:
    fake = FakeRouter()
    inference = SimpleNamespace(access=Access(None, None, date.today, is_loopback=True))
    fake._page = HttpApi(inference, lambda: "f", lambda: True, is_loopback=True)  # type: ignore[arg-type]
    is_up, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        server = HttpServer(fake, None, None)
        fake.origin = f"http://127.0.0.1:{await server.start('127.0.0.1', 0, is_shared=False)}"
        is_up.set()
        await asyncio.to_thread(is_over.wait)
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-router")
    thread.start()
    try:
        assert is_up.wait(WAIT_S)
        yield fake
    finally:
        fake.go_on()
        is_over.set()
        thread.join(WAIT_S)


# -- what it can say


def chat_chunk(text: str, pieces: Sequence[str] = (), accepted: Sequence[int] = (), finish: str | None = None) -> dict[str, Any]:
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None}
    if pieces:
        chunk["splitfire"] = {"pieces": list(pieces), "accepted_drafts": list(accepted)}
    return chunk


def last_chunk(trace: dict[str, Any] | None, prompt: int = 12, cached: int = 0, generated: int = 4) -> dict[str, Any]:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"choices": [], "usage": usage, **({"splitfire": trace} if trace is not None else {})}


def phase(leg: str, name: str, start_ms: float, duration_ms: float, worker: str = "router", count: int = 1) -> dict[str, Any]:
    return {
        "name": name, "leg": leg, "start_s": start_ms / 1e3, "duration_s": duration_ms / 1e3, "worker": worker, "count": count,
    }  # fmt: skip


def trace_of(phases: Sequence[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    """Whose legs are as long as their phases."""
    legs = {f"{leg}_s": sum(p["duration_s"] for p in phases if p["leg"] == leg) for leg in ("first_token", "second_token", "rest")}
    return {
        "request_id": "r-1", "trace_id": "", **legs, "phases": list(phases),
        "kv_transfer": {"transport": "ucx", "bytes": 1_234_567, "blocks": 4, "duration_s": 0.0021},
        "drafts": {"proposed": 10, "accepted": 7}, **changed,
    }  # fmt: skip


SPLIT = (
    phase("first_token", "accept", 0.0, 0.4),
    phase("first_token", "admit", 0.4, 0.1),
    phase("first_token", "prefill", 0.5, 10.0, "prefill-0"),
    phase("first_token", "transit", 10.5, 1.5),
    phase("second_token", "pack", 12.0, 0.5, "prefill-0"),
    phase("second_token", "wire", 12.5, 1.0),
    phase("second_token", "step", 13.5, 2.5, "decode-0"),
    phase("rest", "forward", 16.0, 60.0, "decode-0", count=94),
    phase("rest", "sample", 76.0, 15.0, "decode-0", count=94),
    phase("rest", "stream", 91.0, 25.0),
)
DONE = b"data: [DONE]\n\n"
