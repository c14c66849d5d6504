"""The sending side of the tcp transport: one connection to one peer, made on the first send and again when it broke.

io thread. Whatever was queued when a connection breaks is lost with it: payloads are completed with the error, control
frames silently, as with a peer that died. A new connection begins with a preface and a whole record. Completions never
run inside the call that posted them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from kvtransfer.frames import MAX_FRAME_BYTES
from kvtransfer.tcp_records import complete
from kvtransfer.tcp_wire import CONTROL, PAYLOAD, Endpoint, preface, record_header
from kvtransfer.transport import Done
from splitfire.core import limits

CONNECT_S = 5.0
TURN_BYTES = 4 * limits.MIB  # at most, for one connection in one turn of the loop; about a millisecond of copying
RECORDS_PER_CALL = 64  # two buffers each; the kernel takes 1024
MAX_QUEUED_FRAMES = 16384  # of control, or the connection is given up; payloads are bounded by the slots the peer lent


def tune(sock: socket.socket) -> None:
    """No delay for small frames; a peer whose machine vanished is noticed by the kernel, without waking us."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in {  # Linux; elsewhere the system's own, longer times hold
        "TCP_KEEPIDLE": limits.KEEPALIVE_TIME_S,
        "TCP_KEEPINTVL": limits.KEEPALIVE_TIMEOUT_S,
        "TCP_USER_TIMEOUT": limits.DEAD_AFTER_S * 1000,  # milliseconds that sent bytes may go unacknowledged
    }.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(seconds))


@dataclass(slots=True, eq=False)
class _Record:
    """What is left to send of one record. `done` is None for control and the preface."""

    parts: list[memoryview]
    done: Done | None


class TcpLink:
    """Invariant: every payload's `done` is called exactly once, unless the transport is closed first."""

    def __init__(self, endpoint: Endpoint, let_go: Callable[[TcpLink], None]) -> None:
        self._endpoint = endpoint
        self._let_go = let_go
        self._queue: deque[_Record] = deque()
        self._num_frames = 0  # in the queue, without a `done`
        self._socket: socket.socket | None = None
        self._is_up = False
        self._is_kicked = False  # a turn is on its way
        self._writer: Callable[[], None] | None = None  # what is called when the socket takes more
        self._is_closed = False
        self._connect_timer: asyncio.TimerHandle | None = None

    def send_control(self, frame: bytes) -> None:
        assert 0 < len(frame) <= MAX_FRAME_BYTES, len(frame)
        if self._is_closed:
            return
        self._post(CONTROL, 0, memoryview(frame), None)

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        if self._is_closed:
            asyncio.get_running_loop().call_soon(complete, done, ConnectionAbortedError("the link is closed"))
            return
        self._post(PAYLOAD, tag, message, done)

    def reach(self, key: bytes) -> memoryview | None:
        return None

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._let_go(self)
            self._drop_connection()
            for done in self._take_queued():
                asyncio.get_running_loop().call_soon(complete, done, ConnectionAbortedError("the link is closed"))

    def shut(self) -> None:
        """The transport closes: what the kernel takes at once still goes out, and nobody is told anything."""
        self._is_closed = True
        if self._is_up and self._socket is not None:
            with suppress(OSError):  # the peer learns it from the closed connection
                self._socket.sendmsg(self._gather(TURN_BYTES))
        self._drop_connection()
        self._take_queued()

    def _post(self, kind: int, tag: int, body: memoryview, done: Done | None) -> None:
        self._queue.append(_Record([memoryview(record_header(kind, len(body), tag)), body], done))
        self._num_frames += done is None
        if not self._is_kicked and (self._writer is None or self._num_frames > MAX_QUEUED_FRAMES):
            self._is_kicked = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Everything that was posted since the last turn goes out in one call."""
        self._is_kicked = False
        if self._socket is None and self._queue:
            self._connect()
        elif self._is_up and self._writer is None:
            self._flush()
        if self._num_frames > MAX_QUEUED_FRAMES:
            self._broke(ConnectionAbortedError("the peer does not read"))

    def _connect(self) -> None:
        endpoint, loop = self._endpoint, asyncio.get_running_loop()
        try:
            sock = self._socket = socket.socket(socket.AF_INET6 if endpoint.is_ipv6 else socket.AF_INET, socket.SOCK_STREAM)
            tune(sock)
            code = sock.connect_ex((endpoint.host, endpoint.port))
        except OSError as exc:
            self._broke(exc)
            return
        if code not in (0, errno.EINPROGRESS):
            self._broke(OSError(code, os.strerror(code)))
            return
        self._watch_writable(self._on_connected)
        self._connect_timer = loop.call_later(CONNECT_S, self._broke, TimeoutError(f"no connection within {CONNECT_S} s"))

    def _on_connected(self) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._broke(OSError(code, os.strerror(code)))
            return
        if self._connect_timer is not None:
            self._connect_timer.cancel()
        self._is_up = True
        self._queue.appendleft(_Record([memoryview(preface(self._endpoint.instance))], None))
        self._num_frames += 1
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_readable)
        self._flush()

    def _on_readable(self) -> None:
        """The peer never speaks on this connection: it closed it, or is not what we take it for."""
        assert self._socket is not None
        try:
            spoke = self._socket.recv(1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._broke(exc)
            return
        self._broke(
            ConnectionAbortedError("not a KV transport") if spoke else ConnectionResetError("the peer closed the connection")
        )

    def _flush(self) -> None:
        """Sends until the kernel takes no more, or the turn is over."""
        assert self._socket is not None
        left = TURN_BYTES
        finished: list[Done] = []
        broken: OSError | None = None
        while self._queue and left > 0:
            try:
                num_bytes = self._socket.sendmsg(self._gather(left))
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                broken = exc
                break
            left -= num_bytes
            self._sent(num_bytes, finished)
        if broken is None:
            self._watch_writable(self._flush if self._queue else None)
        for done in finished:
            complete(done, None)
        if broken is not None:
            self._broke(broken)

    def _gather(self, most: int) -> list[memoryview]:
        """The next bytes to send, `most` of them."""
        buffers = []
        for record in islice(self._queue, RECORDS_PER_CALL):
            for part in record.parts:
                buffers.append(part[:most])
                most -= len(part)
                if most <= 0:
                    return buffers
        return buffers

    def _sent(self, num_bytes: int, finished: list[Done]) -> None:
        while num_bytes:
            record = self._queue[0]
            part = record.parts[0]
            if num_bytes < len(part):
                record.parts[0] = part[num_bytes:]
                return
            num_bytes -= len(part)
            del record.parts[0]
            if not record.parts:
                self._queue.popleft()
                if record.done is None:
                    self._num_frames -= 1
                else:
                    finished.append(record.done)

    def _broke(self, exc: Exception) -> None:
        self._drop_connection()
        for done in self._take_queued():
            complete(done, exc)

    def _take_queued(self) -> list[Done]:
        dones = [record.done for record in self._queue if record.done is not None]
        self._queue.clear()
        self._num_frames = 0
        return dones

    def _watch_writable(self, writer: Callable[[], None] | None) -> None:
        assert self._socket is not None
        if writer is not None and writer != self._writer:
            asyncio.get_running_loop().add_writer(self._socket.fileno(), writer)
        elif writer is None and self._writer is not None:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
        self._writer = writer

    def _drop_connection(self) -> None:
        if self._connect_timer is not None:
            self._connect_timer.cancel()
            self._connect_timer = None
        if self._socket is not None:
            self._watch_writable(None)
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._is_up = False
