"""The HTTP port: uvicorn in the router's own process and loop, within bounds that uvicorn does not have. Event loop only.

httptools parses (llhttp: two lengths, or a length and chunks, are no request); heads are bounded in bytes and in time, connections in
number.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from splitfire.core.errors import ConfigError

log = structlog.get_logger("router")
MAX_HEAD_BYTES = 64 * 1024
HEAD_S = 10.0  # that a head may take to come, the first from the connection on
IDLE_S = 75.0  # between two requests of a connection
# A client that vanished is asked for a sign of life, and given up when nothing came, neither that nor what was written. One that reads
# nothing looks the same to the kernel, so this is little less than what slow clients get.
ASKED_AFTER_S, ASKED_EVERY_S, GONE_S = 10, 5, 25
MAX_CONNECTIONS = 4096
BACKLOG = 1024
STOP_S = 1.0
ABORT = "abort"  # in the state of a request's scope: ends its connection, whatever was not read of it
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """A connection whose heads are short and come soon."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._late = self.loop.call_later(HEAD_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._late is None:  # the first of another request
                self._late = self.loop.call_later(HEAD_S, self.transport.abort)
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self._has_whole_head(data):
                self.transport.write(TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][ABORT] = self.transport.abort

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, of which nobody here makes anything, and which nothing bounds
            self.transport.abort()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._num_head_bytes = True, 0
        super().on_message_complete()

    def _has_whole_head(self, data: bytes) -> bool:
        """The rest is a body's."""
        end = data.find(b"\r\n\r\n")
        return end >= 0 and self._num_head_bytes - len(data) + end <= MAX_HEAD_BYTES

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """Signals are the router's own business."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """`start`, then `stop`."""

    def __init__(self, app: ASGIApp, certificate: Path | None, key: Path | None) -> None:
        self._certificate, self._key = certificate, key
        config = uvicorn.Config(
            app, http=BoundedHttp, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False, date_header=False,
            proxy_headers=False, timeout_keep_alive=int(IDLE_S), backlog=BACKLOG, timeout_graceful_shutdown=int(STOP_S),
            ssl_certfile=certificate, ssl_keyfile=key,
        )  # fmt: skip
        try:
            config.load()
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"tls_cert, tls_key: cannot be used for HTTP: {exc}") from exc
        self._context = config.ssl
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def reload(self) -> None:
        """The certificate is read again, for the connections after this."""
        if self._context is not None and self._certificate is not None and self._key is not None:
            try:
                self._context.load_cert_chain(self._certificate, self._key)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigError(f"tls_cert, tls_key: cannot be used for HTTP: {exc}") from exc

    async def start(self, host: str, port: int, *, is_shared: bool) -> int:
        """The port that was bound. ConfigError when it cannot be had."""
        bound = _bind(host, port, is_shared=is_shared)
        self._serving = asyncio.create_task(self._server.serve(sockets=[bound]), name="http")
        up = asyncio.create_task(self._server.is_up.wait(), name="http-up")
        await asyncio.wait((up, self._serving), return_when=asyncio.FIRST_COMPLETED)
        return int(bound.getsockname()[1])

    async def stop(self) -> None:
        """Lets what is open end for STOP_S."""
        self._server.should_exit = True
        if self._serving is not None:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(2 * STOP_S):
                    await self._serving


def _bind(host: str, port: int, *, is_shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _watch_over(bound)
        bound.bind((host, port))
        bound.setblocking(False)
    except OSError as exc:
        bound.close()
        raise ConfigError(f"http_port {port}: {host} has none like that free: {exc.strerror or exc}; give another, or 0") from exc
    return bound


def _watch_over(listening: socket.socket) -> None:
    """Connections have these options from whom they were accepted by. Linux only: elsewhere the kernel's own patience holds."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ASKED_AFTER_S)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASKED_EVERY_S)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_S * 1000)
