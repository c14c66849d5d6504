"""B47 against a raw socket: heads that are too long, too slow or ambiguous end the connection, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

import router.http_server
from router.http_server import HttpServer
from splitfire.core.errors import ConfigError

GET = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads a body, tells its length."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(str(size))).encode())]})
    await send({"type": "http.response.body", "body": str(size).encode()})


@asynccontextmanager
async def server() -> AsyncIterator[int]:
    made = HttpServer(echo, None, None)
    port = await made.start("127.0.0.1", 0, is_shared=False)
    yield port
    await made.stop()


async def say(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """All that is answered until the other side closes, or nothing more comes for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    told = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                told.extend(chunk)

    reading = asyncio.create_task(read())
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
    for _ in range(10):
        num_told = len(told)
        await asyncio.wait((reading,), timeout=0.5)
        if reading.done() or num_told == len(told) > 0:
            break
    reading.cancel()
    writer.close()
    return bytes(told)


def play(scene: Coroutine[None, None, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scene

    asyncio.run(bounded())


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_closed(head: bytes) -> None:
    async def scene() -> None:
        async with server() as port:
            told = await say(port, head)
            assert b"HTTP/1.1 200" not in told
            assert not told or told.startswith(b"HTTP/1.1 400"), told
            assert (await say(port, GET + b"\r\n")).startswith(b"HTTP/1.1 200"), "and others are served"

    play(scene())


def test_a_head_has_a_bound_in_bytes_and_a_body_none_here() -> None:
    async def scene() -> None:
        async with server() as port:
            lines = [b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(200)]
            for head in ([GET, *lines], [GET + b"X: " + b"a" * 200_000]):
                told = await say(port, *head, b"\r\n\r\n")
                assert told == b"" or told.startswith(b"HTTP/1.1 431"), "what was not read any more may cost the answer"
            body = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + b"a" * 200_000
            assert (await say(port, body)).endswith(b"200000")
            assert (await say(port, body + body)).count(b"HTTP/1.1 200") == 2, "one behind the other"

    play(scene())


def test_a_head_has_a_bound_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: a byte now and then does not keep a connection."""
    monkeypatch.setattr(router.http_server, "HEAD_S", 0.3)

    async def scene() -> None:
        async with server() as port:
            assert await say(port, *[bytes([c]) for c in GET], pause_s=0.05) == b""
            assert await say(port, pause_s=0.0) == b""
            twice = await say(port, GET + b"\r\n", *[bytes([c]) for c in GET], pause_s=0.05)
            assert twice.count(b"HTTP/1.1 200") == 1
            assert (await say(port, GET + b"\r\n")).startswith(b"HTTP/1.1 200")

    play(scene())


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.http_server, "MAX_CONNECTIONS", 3)

    async def scene() -> None:
        async with server() as port:
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert await say(port, GET + b"\r\n") == b""
            idle[0][1].close()
            await asyncio.sleep(0.05)
            assert (await say(port, GET + b"\r\n")).startswith(b"HTTP/1.1 200")
            for _, writer in idle:
                writer.close()

    play(scene())


def test_a_port_that_is_taken_is_named() -> None:
    async def scene() -> None:
        async with server() as port:
            with pytest.raises(ConfigError, match=f"http_port {port}"):
                await HttpServer(echo, None, None).start("127.0.0.1", port, is_shared=False)

    play(scene())


def test_trailers_have_no_use_and_end_a_connection() -> None:
    """Nothing else would bound them."""

    async def scene() -> None:
        async with server() as port:
            head = b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert (await say(port, head, b"1\r\nx\r\n0\r\n\r\n")).endswith(b"1")
            assert not await say(port, head, b"1\r\nx\r\n0\r\n", *[b"a: b\r\n"] * 3, pause_s=0.05)

    play(scene())
