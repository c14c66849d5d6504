"""Plain TCP: for hosts without RDMA, without shared namespaces, or where UCX cannot be had. IPv4 and IPv6.

Runs on the io thread: non-blocking sockets that the event loop watches, so that nothing runs while nothing moves. Each
direction of a pair has its own connection, made by its sender (tcp_link.py); this side accepts, and the bytes of each
connection are told apart in tcp_records.py. Payloads are sent from and received into slots, without a copy in between.

The traffic is clear text and not authenticated, as UCX's is: listen on an isolated network. The random instance in the
address is what a peer must know to get past the preface, and is itself sent in the clear.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import secrets
import socket
from collections import Counter

from kvtransfer.frames import FrameError
from kvtransfer.tcp_link import TURN_BYTES, TcpLink, tune
from kvtransfer.tcp_records import Inbox, RecordParser
from kvtransfer.tcp_wire import INSTANCE_BYTES, Endpoint, parse_address
from kvtransfer.transport import Done, Link, OnControl, SlotMemory, private_memory
from splitfire.core import limits
from splitfire.core.errors import ConfigError

HANDSHAKE_S = 5.0
MAX_UNGREETED = 64  # connections without a preface yet; one more, and the oldest is closed
BACKLOG = 128
ACCEPTS_PER_TURN = 16
ACCEPT_AGAIN_S = 1.0  # after this process or machine ran out of descriptors
READS_PER_TURN = 8  # of one connection; a read of small frames holds a few dozen


class TcpTransport:
    """One listening socket and everything that was accepted on it. Listens from the start, delivers from `start` on."""

    name = "tcp"
    version = "1"

    def __init__(self, host: str = "127.0.0.1", port: int = 0, advertise: str | None = None) -> None:
        ip = _literal(host, "host")
        seen_as = _literal(advertise, "advertise") if advertise is not None else ip
        if seen_as.is_unspecified:
            raise ConfigError(f"tcp: peers cannot connect to {seen_as}; name the address they reach this machine by (advertise)")
        self._listener = _listen(ip, port)
        instance = secrets.token_bytes(INSTANCE_BYTES)
        self.address = bytes(Endpoint(seen_as.compressed, self._listener.getsockname()[1], instance))
        self._inbox = Inbox(instance)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: set[TcpLink] = set()
        self._ungreeted: dict[_Accepted, asyncio.TimerHandle] = {}  # oldest first
        self._accepted: set[_Accepted] = set()  # those whose preface was right
        self._accept_timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def dropped(self) -> Counter[str]:
        """Connections and payloads that were not taken, by reason."""
        return self._inbox.dropped

    def start(self, on_control: OnControl) -> None:
        self._inbox.on_control = on_control
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def allocate(self, num_bytes: int) -> SlotMemory:
        return SlotMemory(private_memory(num_bytes))

    def connect(self, address: bytes) -> Link:
        link = TcpLink(parse_address(address), self._links.discard)
        self._links.add(link)
        return link

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        if not self._is_closed:
            self._inbox.post(tag, buffer, done)

    def cancel(self, tag: int) -> bool:
        return self._inbox.unpost(tag)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._inbox.close()
        for link in self._links:
            link.shut()
        self._links.clear()
        for connection in [*self._ungreeted, *self._accepted]:
            self._drop(connection)
        if self._accept_timer is not None:
            self._accept_timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._listener.fileno())
        self._listener.close()

    # -- accepting

    def _accept(self) -> None:
        assert self._loop is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting()  # the listener stays readable: trying again at once would burn the core
                    return
                continue  # that client went away again
            self._add(sock)

    def _pause_accepting(self) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._listener.fileno())
        self._accept_timer = self._loop.call_later(ACCEPT_AGAIN_S, self._loop.add_reader, self._listener.fileno(), self._accept)

    def _add(self, sock: socket.socket) -> None:
        assert self._loop is not None
        try:
            tune(sock)
        except OSError:  # closed by its other end meanwhile
            sock.close()
            return
        if len(self._ungreeted) >= MAX_UNGREETED:
            self.refuse(next(iter(self._ungreeted)), "too_many_connections")
        connection = _Accepted(self, sock, RecordParser(self._inbox))
        self._ungreeted[connection] = self._loop.call_later(HANDSHAKE_S, self.refuse, connection, "handshake_timeout")
        self._loop.add_reader(sock.fileno(), connection.on_readable)

    def greeted(self, connection: _Accepted) -> None:
        """Its preface was right."""
        if len(self._accepted) >= limits.MAX_WORKERS:
            self.refuse(connection, "too_many_connections")
            return
        self._ungreeted.pop(connection).cancel()
        self._accepted.add(connection)

    def refuse(self, connection: _Accepted, reason: str) -> None:
        self.dropped[reason] += 1
        self._drop(connection)

    def ended(self, connection: _Accepted) -> None:
        """Its other end closed it, or is gone."""
        if not connection.parser.is_between_records:
            self.dropped["truncated"] += 1
        self._drop(connection)

    def _drop(self, connection: _Accepted) -> None:
        timer = self._ungreeted.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._accepted.discard(connection)
        assert self._loop is not None
        self._loop.remove_reader(connection.socket.fileno())
        connection.is_open = False
        connection.socket.close()


class _Accepted:
    """One connection that some peer sends on."""

    def __init__(self, transport: TcpTransport, sock: socket.socket, parser: RecordParser) -> None:
        self.socket = sock
        self.parser = parser
        self.is_open = True
        self._transport = transport

    def on_readable(self) -> None:
        """Reads until nothing is left, or the turn is over: the loop calls again as long as there is something."""
        left = TURN_BYTES
        for _ in range(READS_PER_TURN):
            room = self.parser.room[:left]
            try:
                num_bytes = self.socket.recv_into(room)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                num_bytes = 0
            if not num_bytes:
                self._transport.ended(self)
                return
            was_greeted = self.parser.is_greeted
            try:
                self.parser.took(num_bytes)
            except FrameError as exc:
                self._transport.refuse(self, exc.reason)
                return
            if not was_greeted and self.parser.is_greeted:
                self._transport.greeted(self)
            left -= num_bytes
            if not self.is_open or num_bytes < len(room) or not left:
                return


def _literal(host: str, field: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError as exc:
        raise ConfigError(f"tcp: {field} {host!r} is not an IP address; names are not looked up") from exc
    if ip.is_multicast or "%" in host:
        raise ConfigError(f"tcp: {field} {host!r} cannot be connected to; accepted: an address without a zone, not multicast")
    return ip


def _listen(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"tcp: port {port}, accepted: 1 to 65535, or 0 for any that is free")
    sock = None
    try:
        sock = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip.compressed, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        if sock is not None:
            sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(f"tcp: port {port} of {ip} is in use; choose another, or 0 for any that is free") from exc
        raise ConfigError(f"tcp: cannot listen on port {port} of {ip}: {exc.strerror}") from exc
    return sock
