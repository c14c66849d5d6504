"""The HTTP door with nothing behind it: clients that do not read, or go."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

import router.http_api
from router.access import Access
from router.http_api import HttpApi
from router.http_server import HttpServer
from router.inference import Call
from router.stream import ClientWriter
from splitfire.core.errors import SplitfireError
from splitfire.core.validation import ModelLimits
from splitfire.v1 import inference_pb2 as pb
from tests.faults.sims import until

BODY = json.dumps({"prompt": "x", "stream": True}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)


class Endless:
    """Generates for ever, for who reads; remembers how it ended."""

    def __init__(self, most_s: float) -> None:
        self.model = SimpleNamespace(limits=lambda: ModelLimits("m", 100, 100))
        self.detokenizer = SimpleNamespace(piece=lambda _: b"")
        self.access = Access(None, None, date.today, is_loopback=True)
        self.ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._most_s = most_s

    async def generate(self, _request: pb.GenerateRequest, _call: Call, write: Any) -> None:
        try:
            async with ClientWriter(write, self._most_s) as client:
                while True:
                    await client.write(pb.GenerateResponse(token_ids=[1], text="a" * 10_000))
                    await asyncio.sleep(0)
        except BaseException as exc:
            self.ended.set_result(exc)
            raise


def play(most_s: float, scene: Callable[[Endless, HttpServer, int], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        endless = Endless(most_s)
        server = HttpServer(HttpApi(endless, lambda: "f", lambda: True, is_loopback=True), None, None)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            port = await server.start("127.0.0.1", 0, is_shared=False)
            await scene(endless, server, port)
            await server.stop()

    asyncio.run(bounded())


async def ask(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(connection, REQUEST)
    return connection


def test_who_does_not_read_is_given_up_and_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """P18: nothing of it is left, not even the connection."""
    monkeypatch.setattr(router.http_api, "LAST_WORD_S", 0.2)

    async def scene(endless: Endless, server: HttpServer, port: int) -> None:
        connection = await ask(port)
        error = await endless.ended
        assert isinstance(error, SplitfireError)
        assert error.reason == "slow_consumer"
        await until(lambda: not server.num_connections)  # though the client still reads nothing
        connection.close()

    play(0.3, scene)


def test_who_goes_away_ends_the_work() -> None:
    async def scene(endless: Endless, server: HttpServer, port: int) -> None:
        connection = await ask(port)
        assert await asyncio.get_running_loop().sock_recv(connection, 4096)
        connection.close()
        assert isinstance(await endless.ended, asyncio.CancelledError)
        await until(lambda: not server.num_connections)

    play(30.0, scene)
