"""The tcp transport against what can be at the other end of a socket: nobody, garbage, a killed process, a former one."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer import tcp as tcp_module
from kvtransfer import tcp_link
from kvtransfer.frames import MAX_FRAME_BYTES
from kvtransfer.tcp import TcpTransport
from kvtransfer.tcp_link import TcpLink
from kvtransfer.tcp_wire import CONTROL, PAYLOAD, Endpoint, parse_address, preface, record_header
from kvtransfer.transport import slot_tag
from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.core.limits import MIB
from tests.kvtransfer.nodes import SENTINEL, Node, content, play, settle, until

TAG = slot_tag(1, 1)


def create() -> Node:
    return Node(TcpTransport()).start()


def tcp(node: Node) -> TcpTransport:
    assert isinstance(node.transport, TcpTransport)
    return node.transport


def endpoint(node: Node) -> Endpoint:
    return parse_address(node.transport.address)


def close(*nodes: Node) -> None:
    for node in nodes:
        node.transport.close()


class Stranger:
    """A socket without a transport behind it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def is_refused(self) -> bool:
        """Waits until the other side closes."""
        async with asyncio.timeout(10):
            try:
                return await asyncio.get_running_loop().sock_recv(self.socket, 1) == b""
            except ConnectionResetError:
                return True


@asynccontextmanager
async def stranger(node: Node, opening: bytes | None = None) -> AsyncIterator[Stranger]:
    """Connected to `node`, with a right preface said unless another opening is given."""
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (endpoint(node).host, endpoint(node).port))
        it = Stranger(sock)
        await it.say(preface(endpoint(node).instance) if opening is None else opening)
        yield it


async def assert_still_works(node: Node) -> None:
    """Control and payload from a proper peer arrive."""
    peer, tag = create(), slot_tag(0xFFFFFF, len(node.outcomes))
    slot, name = node.slot(5000), f"still works {tag}"
    node.transport.receive(tag, slot, node.note(name))
    link = peer.connect(node)
    link.send_control(b"still works?")
    link.send_payload(tag, memoryview(content(8, 5000)), peer.note("send"))
    await until(lambda: node.outcomes[name] == [None] and b"still works?" in node.frames)
    assert slot == content(8, 5000)
    node.frames.remove(b"still works?")
    close(peer)


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "bad_magic"),
        (b'{"tag": 1}', "bad_magic"),
        (b"\x80\x04\x95", "bad_magic"),
        (b"\xc7\x08\x01", "bad_magic"),
        (record_header(CONTROL, 5, 0) + b"early", "bad_magic"),
        (b"SFKVTCP\0", "unsupported_version"),
        (b"SFKVTCP\xff", "unsupported_version"),
        (preface(b"another instance"), "stale_connection"),
    ],
)
def test_a_wrong_opening_closes_the_connection_and_is_counted(opening: bytes, reason: str) -> None:
    """B64, B77, B87."""

    async def scene() -> None:
        node = create()
        async with stranger(node, opening) as caller:
            assert await caller.is_refused()
        assert tcp(node).dropped == {reason: 1} and not node.frames
        await assert_still_works(node)
        close(node)

    play(scene())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (record_header(CONTROL, 0, 0), "truncated"),
        (record_header(CONTROL, MAX_FRAME_BYTES + 1, 0), "too_long"),
        (record_header(CONTROL, 0xFFFFFFFF, 0), "too_long"),
        (record_header(PAYLOAD, 5001, TAG), "too_long"),
        (record_header(PAYLOAD, 0xFFFFFFFF, TAG), "too_long"),
        (record_header(PAYLOAD, 0xFFFFFFFF, TAG + 1), "too_long"),
        (record_header(7, 5, 0), "unknown_kind"),
        (b"\1\0\0\x80" + bytes(12), "unknown_kind"),
    ],
)
def test_a_wrong_record_closes_the_connection_and_is_counted(record: bytes, reason: str) -> None:
    """B65, B68."""

    async def scene() -> None:
        node = create()
        node.transport.receive(TAG, node.slot(5000), node.note("receive"))
        async with stranger(node) as caller:
            await caller.say(record)
            assert await caller.is_refused()
        assert tcp(node).dropped == {reason: 1} and not node.frames and not node.outcomes["receive"]
        await assert_still_works(node)
        close(node)

    play(scene())


def test_bytes_after_a_payload_close_the_connection() -> None:
    """B67: and a second handshake is such bytes (B77)."""

    async def scene() -> None:
        node = create()
        for i, trailing in enumerate((bytes(16), b"\xff" * 40, preface(endpoint(node).instance))):
            node.transport.receive(slot_tag(i, 1), node.slot(100), node.note(f"receive {i}"))
            async with stranger(node) as caller:
                await caller.say(record_header(PAYLOAD, 100, slot_tag(i, 1)) + bytes(100) + trailing)
                assert await caller.is_refused()
            assert node.outcomes[f"receive {i}"] == [None]
        assert tcp(node).dropped == {"unknown_kind": 3}
        close(node)

    play(scene())


def test_a_stream_cut_at_every_byte_delivers_no_part_of_a_message() -> None:
    """B66, F40: half-closed, as by a process that ends."""

    async def scene() -> None:
        node = create()
        slot = node.slot(64)
        node.transport.receive(TAG, slot, node.note("receive"))
        opening = preface(endpoint(node).instance)
        stream = opening + record_header(CONTROL, 40, 0) + b"c" * 40 + record_header(PAYLOAD, 64, TAG) + b"p" * 64
        whole = {len(opening), len(opening) + 16 + 40}
        num_truncated = 0
        for cut in range(len(stream)):
            async with stranger(node, stream[:cut]) as caller:
                caller.socket.shutdown(socket.SHUT_WR)
                assert await caller.is_refused()
            num_truncated += cut not in whole
            assert tcp(node).dropped["truncated"] == num_truncated, cut
        assert not node.outcomes["receive"]
        assert node.frames == [b"c" * 40] * (len(stream) - len(opening) - 56)
        async with stranger(node, stream) as caller:
            await until(lambda: node.outcomes["receive"] == [None])
        assert slot == b"p" * 64
        close(node)

    play(scene())


def test_a_sender_of_one_byte_at_a_time_is_understood() -> None:
    """B80."""

    async def scene() -> None:
        node = create()
        node.transport.receive(TAG, node.slot(64), node.note("receive"))
        async with stranger(node, b"") as caller:
            caller.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = preface(endpoint(node).instance) + record_header(CONTROL, 40, 0) + b"c" * 40
            for byte in stream + record_header(PAYLOAD, 64, TAG) + b"p" * 64:
                await caller.say(bytes([byte]))
                await asyncio.sleep(0)
            await until(lambda: node.frames == [b"c" * 40] and node.outcomes["receive"] == [None])
        close(node)

    play(scene())


@given(garbage=st.binary(min_size=1, max_size=2000), is_greeted=st.booleans(), is_cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_neither_kills_nor_wedges_the_listener(garbage: bytes, is_greeted: bool, is_cut: bool) -> None:
    async def scene() -> None:
        node = create()
        node.transport.receive(TAG, node.slot(64), node.note("receive"))
        async with stranger(node, None if is_greeted else b"") as caller:
            try:
                await caller.say(garbage)
            except (ConnectionResetError, BrokenPipeError):
                pass
            if is_cut:
                caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                caller.socket.close()
            await assert_still_works(node)
        assert not node.outcomes["receive"] or is_greeted
        close(node)

    play(scene())


def test_a_payload_nobody_waits_for_is_thrown_away_and_the_connection_goes_on() -> None:
    async def scene() -> None:
        here, there = create(), create()
        slot = there.slot(2 * MIB)
        there.transport.receive(TAG, slot, there.note("receive"))
        link = here.connect(there)
        for generation in (7, 8, 9):
            link.send_payload(slot_tag(1, generation), memoryview(content(generation, 2 * MIB)), here.note("late"))
        link.send_control(b"after them")
        link.send_payload(TAG, memoryview(content(1, 2 * MIB)), here.note("send"))
        await until(lambda: there.outcomes["receive"] == here.outcomes["send"] == [None])
        assert here.outcomes["late"] == [None] * 3
        assert there.frames == [b"after them"] and slot == content(1, 2 * MIB)
        assert tcp(there).dropped == {"unexpected_payload": 3}
        late = there.slot(2 * MIB)
        there.transport.receive(slot_tag(1, 7), late, there.note("posted late"))
        await settle()
        assert not there.outcomes["posted late"] and late[0] == SENTINEL, "it was stored"
        close(here, there)

    play(scene())


# -- connections that are not made, or break


def test_a_connection_meant_for_a_former_process_on_the_port_is_refused() -> None:
    async def scene() -> None:
        former, here = create(), create()
        link = here.connect(former)
        close(former)
        present = Node(TcpTransport(port=endpoint(former).port)).start()
        present.transport.receive(TAG, present.slot(64 * MIB), present.note("receive"))
        link.send_control(b"to the former one")
        link.send_payload(TAG, memoryview(bytes(64 * MIB)), here.note("send"))
        await until(lambda: bool(here.outcomes["send"]))
        assert isinstance(here.outcomes["send"][0], ConnectionError)
        assert tcp(present).dropped == {"stale_connection": 1} and not present.frames and not present.outcomes["receive"]
        await assert_still_works(present)
        close(here, present)

    play(scene())


def break_connections(node: Node) -> None:
    for connection in list(tcp(node)._accepted):
        tcp(node)._drop(connection)


def test_a_link_whose_connection_broke_in_silence_makes_another_on_the_next_send() -> None:
    """F78."""

    async def scene() -> None:
        here, there = create(), create()
        link = here.connect(there)
        assert isinstance(link, TcpLink)
        for i in range(3):
            link.send_control(b"frame %d" % i)
            await until(lambda: len(there.frames) == i + 1)  # noqa: B023
            break_connections(there)
            await until(lambda: link._socket is None)
        there.transport.receive(TAG, there.slot(MIB), there.note("receive"))
        link.send_payload(TAG, memoryview(bytes(MIB)), here.note("send"))
        await until(lambda: there.outcomes["receive"] == here.outcomes["send"] == [None])
        assert there.frames == [b"frame 0", b"frame 1", b"frame 2"] and not tcp(there).dropped
        close(here, there)

    play(scene())


def test_a_break_in_mid_payload_fails_the_send_and_the_receive_waits_for_the_next() -> None:
    size = 64 * MIB

    async def scene() -> None:
        here, there = create(), create()
        slot, message = there.slot(size), memoryview(content(1, MIB) * 64)
        there.transport.receive(TAG, slot, there.note("receive"))
        link = here.connect(there)
        link.send_payload(TAG, message, here.note("send"))
        link.send_payload(slot_tag(2, 1), message, here.note("queued"))
        link.send_control(b"queued behind")
        await until(lambda: slot[MIB] != SENTINEL)
        break_connections(there)
        await until(lambda: bool(here.outcomes["send"] and here.outcomes["queued"]))
        await settle()
        for name in ("send", "queued"):
            assert len(here.outcomes[name]) == 1 and isinstance(here.outcomes[name][0], OSError)
        assert not there.outcomes["receive"] and not there.frames
        link.send_payload(TAG, message, here.note("again"))
        await until(lambda: there.outcomes["receive"] == here.outcomes["again"] == [None])
        assert slot == message
        close(here, there)

    play(scene())


def test_a_link_closed_in_mid_payload_gives_the_memory_back_and_completes_nothing_falsely() -> None:
    async def scene() -> None:
        here, there = create(), create()
        slot = there.slot(64 * MIB)
        there.transport.receive(TAG, slot, there.note("receive"))
        link = here.connect(there)
        link.send_payload(TAG, memoryview(bytes(64 * MIB)), here.note("send"))
        await until(lambda: slot[MIB] != SENTINEL)
        link.close()
        assert not here.outcomes["send"], "inside the call"
        await until(lambda: bool(here.outcomes["send"]))
        await until(lambda: tcp(there).dropped["truncated"] == 1)
        assert isinstance(here.outcomes["send"][0], ConnectionAbortedError) and not there.outcomes["receive"]
        close(here, there)

    play(scene())


def test_nobody_at_the_port_is_an_error_of_the_send() -> None:
    async def scene() -> None:
        here, gone = create(), create()
        link = here.connect(gone)
        close(gone)
        for i in range(3):
            link.send_control(b"x" * 40)
            link.send_payload(TAG, memoryview(bytes(100)), here.note(f"send {i}"))
            await until(lambda: bool(here.outcomes[f"send {i}"]))  # noqa: B023
            assert isinstance(here.outcomes[f"send {i}"][0], OSError)
        close(here)

    play(scene())


def test_a_connection_that_cannot_be_made_fails_its_sends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's queue of connections is full, so its kernel does not answer: as behind a firewall."""
    monkeypatch.setattr(tcp_link, "CONNECT_S", 0.3)

    async def scene() -> None:
        here = create()
        with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            for filler in (first, second):
                filler.setblocking(False)
                filler.connect_ex(silent.getsockname())
            link = here.transport.connect(bytes(Endpoint("127.0.0.1", silent.getsockname()[1], bytes(16))))
            began = time.monotonic()
            link.send_payload(TAG, memoryview(bytes(100)), here.note("send"))
            await until(lambda: bool(here.outcomes["send"]))
            assert isinstance(here.outcomes["send"][0], TimeoutError) and 0.25 < time.monotonic() - began < 5
        close(here)

    play(scene())


def test_a_peer_that_never_reads_is_given_up_when_its_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_link, "MAX_QUEUED_FRAMES", 100)

    async def scene() -> None:
        here = create()
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen()
            link = here.transport.connect(bytes(Endpoint("127.0.0.1", deaf.getsockname()[1], bytes(16))))
            link.send_payload(TAG, memoryview(bytes(256 * MIB)), here.note("send"))
            for _ in range(101):
                link.send_control(bytes(100))
                await asyncio.sleep(0)
            await until(lambda: bool(here.outcomes["send"]))
            assert isinstance(here.outcomes["send"][0], ConnectionAbortedError)
        close(here)

    play(scene())


def test_a_peer_that_speaks_on_our_connection_is_not_one_of_ours() -> None:
    async def scene() -> None:
        here = create()
        with socket.socket() as talker:
            talker.bind(("127.0.0.1", 0))
            talker.listen()
            talker.setblocking(False)
            link = here.transport.connect(bytes(Endpoint("127.0.0.1", talker.getsockname()[1], bytes(16))))
            link.send_payload(TAG, memoryview(bytes(256 * MIB)), here.note("send"))
            accepted, _address = await asyncio.get_running_loop().sock_accept(talker)
            with accepted:
                accepted.send(b"220 mail.example.com ESMTP\r\n")
                await until(lambda: bool(here.outcomes["send"]))
            assert isinstance(here.outcomes["send"][0], ConnectionAbortedError)
        close(here)

    play(scene())


# -- other processes

PEER = """
import asyncio, sys
from kvtransfer.tcp import TcpTransport
async def main():
    transport = TcpTransport()
    transport.start(lambda frame: None)
    print(transport.address.decode(), flush=True)
    {act}
    await asyncio.sleep(60)
asyncio.run(main())
"""
RECEIVE = "transport.receive({tag}, transport.allocate(256 << 20).buffer, lambda exc: print('done', exc, flush=True))"
SEND = """link = transport.connect({address!r})
    link.send_control(b'on its way')
    link.send_payload({tag}, memoryview(bytes(256 << 20)), lambda exc: print('done', exc, flush=True))"""


@contextmanager
def process(act: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A peer of its own, and its address."""
    with subprocess.Popen([sys.executable, "-c", PEER.format(act=act)], stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            yield peer, peer.stdout.readline().strip().encode()
        finally:
            peer.kill()


def test_a_receiver_killed_in_mid_payload_fails_the_send_within_a_second() -> None:
    async def scene() -> None:
        here = create()
        with process(RECEIVE.format(tag=TAG)) as (peer, address):
            link = here.transport.connect(address)
            assert isinstance(link, TcpLink)
            message = memoryview(bytes(256 << 20))
            link.send_payload(TAG, message, here.note("send"))
            await until(lambda: link._is_up and len(link._queue[0].parts[-1]) < (256 << 20) - 8 * MIB)
            peer.kill()
            began = time.monotonic()
            await until(lambda: bool(here.outcomes["send"]))
            assert time.monotonic() - began < 1.0
            assert peer.stdout is not None and peer.stdout.read() == "", "it had not arrived"
        await settle()
        assert len(here.outcomes["send"]) == 1 and isinstance(here.outcomes["send"][0], OSError)
        await assert_still_works(here)
        close(here)

    play(scene())


def test_a_sender_killed_in_mid_payload_completes_nothing_and_costs_only_itself() -> None:
    async def scene() -> None:
        here = create()
        slot = here.slot(256 << 20)
        here.transport.receive(TAG, slot, here.note("receive"))
        with process(SEND.format(address=here.transport.address, tag=TAG)) as (peer, _address):
            await until(lambda: slot[8 * MIB] != SENTINEL)
            peer.kill()
            await until(lambda: tcp(here).dropped["truncated"] == 1)
        assert here.frames == [b"on its way"] and not here.outcomes["receive"]
        here.frames.clear()
        await assert_still_works(here)
        close(here)

    play(scene())


# -- many connections, and turns


def test_a_handshake_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """B77."""
    monkeypatch.setattr(tcp_module, "HANDSHAKE_S", 0.2)

    async def scene() -> None:
        node = create()
        async with stranger(node, b"SFKV") as slow, stranger(node, b"") as silent, stranger(node) as proper:
            assert await slow.is_refused() and await silent.is_refused()
            assert tcp(node).dropped == {"handshake_timeout": 2}
            await proper.say(record_header(CONTROL, 4, 0) + b"fine")
            await until(lambda: node.frames == [b"fine"])
        close(node)

    play(scene())


def test_connections_without_a_preface_push_each_other_out_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """B81."""
    monkeypatch.setattr(tcp_module, "MAX_UNGREETED", 8)

    async def scene() -> None:
        node = create()
        async with stranger(node) as proper:
            await until(lambda: len(tcp(node)._accepted) == 1)
            silent = [socket.create_connection((endpoint(node).host, endpoint(node).port)) for _ in range(40)]
            await until(lambda: tcp(node).dropped["too_many_connections"] == 32)
            assert len(tcp(node)._ungreeted) == 8
            await assert_still_works(node)
            await proper.say(record_header(CONTROL, 4, 0) + b"fine")
            await until(lambda: node.frames == [b"fine"])
            for sock in silent:
                sock.close()
        close(node)

    play(scene())


def test_more_connections_than_there_can_be_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_WORKERS", 2)

    async def scene() -> None:
        node = create()
        async with stranger(node) as first, stranger(node):
            await until(lambda: len(tcp(node)._accepted) == 2)
            async with stranger(node) as third:
                assert await third.is_refused()
            assert tcp(node).dropped == {"too_many_connections": 1}
            first.socket.close()
            await until(lambda: len(tcp(node)._accepted) == 1)
            async with stranger(node) as third:
                await third.say(record_header(CONTROL, 4, 0) + b"fine")
                await until(lambda: node.frames == [b"fine"])
        close(node)

    play(scene())


def test_running_out_of_descriptors_neither_spins_nor_ends_the_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module, "ACCEPT_AGAIN_S", 0.2)

    async def scene() -> None:
        node = create()
        with socket.socket() as caller:
            caller.setblocking(False)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (caller.fileno() + 1, hard))
            try:
                caller.connect_ex((endpoint(node).host, endpoint(node).port))
                await until(lambda: tcp(node)._accept_timer is not None)
                before = time.thread_time()
                await asyncio.sleep(0.1)
                assert time.thread_time() - before < 0.05
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: len(tcp(node)._ungreeted) == 1)
        await assert_still_works(node)
        close(node)

    play(scene())


def test_one_busy_connection_leaves_turns_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is in the kernel before the loop looks; one callback takes a bounded part of it."""
    monkeypatch.setattr(tcp_module, "READS_PER_TURN", 1)
    monkeypatch.setattr(tcp_module, "TURN_BYTES", 4096)

    async def scene() -> None:
        node = create()
        turns = 0
        arrived: list[int] = []

        def turn() -> None:
            nonlocal turns
            turns += 1
            if len(arrived) < 101:
                asyncio.get_running_loop().call_soon(turn)

        tcp(node)._inbox.on_control = lambda _frame: arrived.append(turns)
        node.transport.receive(TAG, node.slot(65536), lambda _exc: arrived.append(turns))
        async with stranger(node) as caller:
            await until(lambda: len(tcp(node)._accepted) == 1)
            caller.socket.send(
                (record_header(CONTROL, 88, 0) + b"m" * 88) * 100 + record_header(PAYLOAD, 65536, TAG) + bytes(65536)
            )
            turn()
            await until(lambda: len(arrived) == 101)
        assert max(arrived.count(t) for t in set(arrived)) <= 4096 // 104
        assert arrived[100] - arrived[99] >= 65536 // 4096 - 1
        close(node)

    play(scene())


def test_a_bug_in_a_callback_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        here, there = create(), create()
        heard: list[bytes] = []

        def hear(frame: memoryview) -> None:
            heard.append(bytes(frame))
            raise ZeroDivisionError

        def broken(exc: Exception | None) -> None:
            heard.append(b"done" if exc is None else b"failed")
            raise ZeroDivisionError

        tcp(there)._inbox.on_control = hear
        there.transport.receive(TAG, there.slot(100), broken)
        link = here.connect(there)
        link.send_control(b"one")
        link.send_payload(TAG, memoryview(bytes(100)), broken)
        link.send_control(b"two")
        await until(lambda: sorted(heard) == [b"done", b"done", b"one", b"two"])
        close(here, there)

    play(scene())


def test_a_transport_closed_by_its_own_callback_delivers_nothing_more() -> None:
    async def scene() -> None:
        here, there = create(), create()
        heard: list[bytes] = []

        def hear(frame: memoryview) -> None:
            heard.append(bytes(frame))
            close(there)

        tcp(there)._inbox.on_control = hear
        link = here.connect(there)
        for _ in range(10):
            link.send_control(b"stop")
        await until(lambda: bool(heard))
        await settle()
        assert heard == [b"stop"]
        close(here)

    play(scene())


def test_what_was_said_just_before_the_end_still_goes_out() -> None:
    """A worker that stops tells its peers so, and closes in the same turn."""

    async def scene() -> None:
        here, there = create(), create()
        link = here.connect(there)
        link.send_control(b"hello")
        await until(lambda: there.frames == [b"hello"])
        link.send_control(b"we stop")
        close(here)
        await until(lambda: there.frames == [b"hello", b"we stop"])
        assert not tcp(there).dropped
        close(there)

    play(scene())


# -- where it listens


def test_ipv6() -> None:
    async def scene() -> None:
        try:
            there = Node(TcpTransport("::1")).start()
        except ConfigError as exc:
            pytest.skip(str(exc))
        assert there.transport.address.startswith(b"tcp://[::1]:")
        await assert_still_works(there)
        close(there)

    play(scene())


def test_it_can_listen_everywhere_and_be_reached_by_one_address() -> None:
    async def scene() -> None:
        there = Node(TcpTransport("0.0.0.0", advertise="127.0.0.1")).start()
        assert there.transport.address.startswith(b"tcp://127.0.0.1:")
        await assert_still_works(there)
        close(there)

    play(scene())


def test_a_port_in_use_is_one_line_that_names_it() -> None:
    first = TcpTransport()
    port = parse_address(first.address).port
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; choose another") as caught:
        TcpTransport(port=port)
    assert "\n" not in str(caught.value)
    first.close()
    TcpTransport(port=port).close()


@pytest.mark.parametrize(
    ("host", "port", "advertise", "message"),
    [
        ("localhost", 0, None, "host 'localhost' is not an IP address"),
        ("", 0, None, "host '' is not an IP address"),
        ("127.0.0.1", 0, "worker-1.example", "advertise 'worker-1.example' is not an IP address"),
        ("0.0.0.0", 0, None, "peers cannot connect to 0.0.0.0; name the address"),
        ("::", 0, None, "peers cannot connect to ::; name the address"),
        ("127.0.0.1", 0, "0.0.0.0", "peers cannot connect to 0.0.0.0"),
        ("224.0.0.1", 0, None, "host '224.0.0.1' cannot be connected to"),
        ("fe80::1%lo", 0, None, "host 'fe80::1%lo' cannot be connected to"),
        ("127.0.0.1", -1, None, "port -1, accepted: 1 to 65535"),
        ("127.0.0.1", 65536, None, "port 65536, accepted: 1 to 65535"),
        ("203.0.113.7", 0, None, "cannot listen on port 0 of 203.0.113.7: Cannot assign requested address"),
    ],
)
def test_where_nothing_can_listen_is_said_in_one_line(host: str, port: int, advertise: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TcpTransport(host, port, advertise)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_accept_of_a_client_that_went_away_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        """ECONNABORTED once, then the real one."""

        def __init__(self, sock: socket.socket) -> None:
            self._socket = sock
            self.num_calls = 0

        def accept(self) -> tuple[socket.socket, object]:
            self.num_calls += 1
            if self.num_calls == 1:
                raise OSError(errno.ECONNABORTED, "aborted")
            return self._socket.accept()

        def fileno(self) -> int:
            return self._socket.fileno()

        def close(self) -> None:
            self._socket.close()

    async def scene() -> None:
        node = create()
        listener = Listener(tcp(node)._listener)
        monkeypatch.setattr(node.transport, "_listener", listener)
        await assert_still_works(node)
        assert listener.num_calls > 1
        close(node)

    play(scene())


def test_it_needs_no_ucx() -> None:
    code = "import sys; sys.modules['ucxx'] = None; import kvtransfer.tcp, kvtransfer.agent; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"
