"""Messages between rank 0 and one follower, over a pair of connected sockets. The thread that computes steps."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<Q")


class Channel:
    """Whole messages in order. Closed by whichever side ends first: there is no other way to end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: bytes, timeout_s: float | None = None) -> None:
        """OSError when the other side is gone, or does not read in time."""
        self._end.settimeout(timeout_s)
        self._end.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, timeout_s: float | None = None) -> bytearray | None:
        """None when the other side is gone. TimeoutError when nothing came in time."""
        self._end.settimeout(timeout_s)
        try:
            head = self._exactly(_LENGTH.size)
            return None if head is None else self._exactly(*_LENGTH.unpack(head))
        except ConnectionResetError:
            return None

    def close(self) -> None:
        self._end.close()

    def _exactly(self, count: int) -> bytearray | None:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            received = self._end.recv_into(view[done:])
            if not received:
                return None
            done += received
        return data
