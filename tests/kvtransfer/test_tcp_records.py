"""The bytes of the tcp transport without sockets: wherever a stream is cut, whatever it holds, only whole messages count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.frames import MAX_FRAME_BYTES, FrameError
from kvtransfer.tcp_records import SCRATCH_BYTES, Inbox, RecordParser
from kvtransfer.tcp_wire import (
    CONTROL,
    HEADER_BYTES,
    PAYLOAD,
    PREFACE_BYTES,
    Endpoint,
    parse_address,
    preface,
    record_header,
)
from splitfire.core.errors import Unavailable

INSTANCE = bytes(range(16))
SLOT_BYTES = 100


def control(frame: bytes) -> bytes:
    return record_header(CONTROL, len(frame), 0) + frame


def payload(tag: int, message: bytes) -> bytes:
    return record_header(PAYLOAD, len(message), tag) + message


class Receiver:
    """An inbox with two receives posted, tags 1 and 2."""

    def __init__(self) -> None:
        self.inbox = Inbox(INSTANCE)
        self.inbox.on_control = lambda frame: self.frames.append(bytes(frame))
        self.frames: list[bytes] = []
        self.slots: dict[int, bytearray] = {}
        self.outcomes: list[tuple[int, Exception | None]] = []
        for tag in (1, 2):
            self.post(tag)

    def post(self, tag: int) -> None:
        slot = self.slots[tag] = bytearray(b"\xa5" * SLOT_BYTES)
        self.inbox.post(tag, memoryview(slot), lambda exc: self.outcomes.append((tag, exc)))

    def connection(self) -> RecordParser:
        return RecordParser(self.inbox)


def feed(parser: RecordParser, data: bytes, most: int = 1 << 30) -> None:
    """As a socket does: at most what there is room for, `most` at a time."""
    while data:
        room = parser.room[:most]
        num_bytes = min(len(room), len(data))
        room[:num_bytes] = data[:num_bytes]
        parser.took(num_bytes)
        data = data[num_bytes:]


STREAM = (
    preface(INSTANCE) + control(b"a" * 40) + payload(1, b"b" * 70) + payload(9, b"c" * 50) + control(b"d") + payload(2, b"e" * 100)
)


def assert_got_all(receiver: Receiver) -> None:
    assert receiver.frames == [b"a" * 40, b"d"]
    assert receiver.outcomes == [(1, None), (2, None)]
    assert receiver.slots == {1: b"b" * 70 + b"\xa5" * 30, 2: b"e" * 100}
    assert receiver.inbox.dropped == {"unexpected_payload": 1}


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 24, 1000])
def test_how_a_stream_is_cut_up_makes_no_difference(most: int) -> None:
    receiver = Receiver()
    parser = receiver.connection()
    feed(parser, STREAM, most)
    assert parser.is_greeted and parser.is_between_records
    assert_got_all(receiver)


@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=400))
def test_how_a_stream_is_cut_up_at_random_makes_no_difference(cuts: list[int]) -> None:
    receiver, rest = Receiver(), STREAM
    parser = receiver.connection()
    for cut in [*cuts, len(STREAM)]:
        feed(parser, rest[:cut])
        rest = rest[cut:]
    assert_got_all(receiver)


def test_a_stream_that_ends_anywhere_delivers_whole_messages_only() -> None:
    """B66: at every byte offset, and no offset inside a record looks like an end."""
    ends = [PREFACE_BYTES]
    for length in (40, 70, 50, 1, 100):
        ends.append(ends[-1] + HEADER_BYTES + length)
    for cut in range(len(STREAM) + 1):
        receiver = Receiver()
        parser = receiver.connection()
        feed(parser, STREAM[:cut])
        assert parser.is_between_records == (cut in ends)
        assert receiver.frames == [f for f, end in ((b"a" * 40, ends[1]), (b"d", ends[4])) if cut >= end]
        assert receiver.outcomes == [(tag, None) for tag, end in ((1, ends[2]), (2, ends[5])) if cut >= end]


@given(st.binary(max_size=300), st.sampled_from([b"", preface(INSTANCE), preface(INSTANCE) + control(b"x" * 40)]))
@settings(max_examples=300)
def test_garbage_is_an_error_with_a_reason_or_a_message_but_nothing_else(garbage: bytes, before: bytes) -> None:
    receiver = Receiver()
    parser = receiver.connection()
    try:
        feed(parser, before + garbage)
    except FrameError as exc:
        assert exc.reason in {"bad_magic", "unsupported_version", "stale_connection", "unknown_kind", "too_long", "truncated"}
    assert all(exc is None for _tag, exc in receiver.outcomes)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (record_header(CONTROL, 0, 0), "truncated"),
        (record_header(PAYLOAD, 0, 1), "truncated"),
        (record_header(CONTROL, MAX_FRAME_BYTES + 1, 0), "too_long"),
        (record_header(CONTROL, 0xFFFFFFFF, 0), "too_long"),
        (record_header(PAYLOAD, SLOT_BYTES + 1, 1), "too_long"),
        (record_header(PAYLOAD, SLOT_BYTES + 1, 999), "too_long"),
        (record_header(PAYLOAD, 0xFFFFFFFF, 999), "too_long"),
        (record_header(0, 40, 0), "unknown_kind"),
        (record_header(3, 40, 0), "unknown_kind"),
        (record_header(0xFFFF, 40, 0), "unknown_kind"),
        (record_header(CONTROL, 40, 1), "unknown_kind"),
        *((record_header(PAYLOAD, 40, 1)[:2] + (1 << bit).to_bytes(2, "little") + bytes(12), "unknown_kind") for bit in range(16)),
        (preface(INSTANCE), "unknown_kind"),
    ],
)
def test_a_wrong_record_header_is_refused_before_anything_is_allocated_or_claimed(record: bytes, reason: str) -> None:
    """B65, B68, B77."""
    receiver = Receiver()
    parser = receiver.connection()
    feed(parser, preface(INSTANCE))
    with pytest.raises(FrameError) as caught:
        feed(parser, record)
    assert caught.value.reason == reason
    assert not receiver.frames and not receiver.outcomes
    feed(receiver.connection(), STREAM)
    assert_got_all(receiver)


def test_lengths_at_their_limits_are_taken() -> None:
    receiver = Receiver()
    feed(receiver.connection(), preface(INSTANCE) + control(b"m" * MAX_FRAME_BYTES) + payload(1, b"n" * SLOT_BYTES))
    assert receiver.frames == [b"m" * MAX_FRAME_BYTES] and receiver.slots[1] == b"n" * SLOT_BYTES


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (b"\0", "bad_magic"),
        (b"SFKV\x01\x01", "bad_magic"),  # a frame, of the layer above
        (b"GET / HTTP/1.1\r\n\r\n", "bad_magic"),
        (b'{"kind": 1}', "bad_magic"),
        (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system", "bad_magic"),  # a pickle
        (b"\xc7\x08\x01\xde\xad\xbe\xef", "bad_magic"),  # a msgpack extension
        (control(b"x" * 40), "bad_magic"),  # B77: data before the handshake
        (b"SFKVTCP\0", "unsupported_version"),
        (b"SFKVTCP\x02", "unsupported_version"),
        (b"SFKVTCP\xff", "unsupported_version"),
        (preface(bytes(16)), "stale_connection"),
        (preface(INSTANCE[:-1] + b"\0"), "stale_connection"),
    ],
)
def test_what_is_not_our_preface_is_refused_at_its_first_wrong_byte(opening: bytes, reason: str) -> None:
    """B64, B77, B87: without waiting for the rest."""
    receiver = Receiver()
    with pytest.raises(FrameError) as caught:
        feed(receiver.connection(), opening, most=1)
    assert caught.value.reason == reason


def test_a_long_payload_nobody_waits_for_is_read_past_in_bounded_memory() -> None:
    receiver = Receiver()
    receiver.inbox.post(3, memoryview(bytearray(3 * SCRATCH_BYTES)), lambda _exc: None)
    parser = receiver.connection()
    feed(parser, preface(INSTANCE) + record_header(PAYLOAD, 3 * SCRATCH_BYTES - 1, 999))
    assert len(parser.room) <= SCRATCH_BYTES
    feed(parser, bytes(3 * SCRATCH_BYTES - 1) + control(b"after"))
    assert receiver.frames == [b"after"] and receiver.inbox.dropped == {"unexpected_payload": 1}


def test_a_message_sent_again_takes_over_from_one_that_stalled() -> None:
    """Its sender saw its first connection break before we did: the old bytes must not get into the new message."""
    receiver = Receiver()
    old, new = receiver.connection(), receiver.connection()
    feed(old, preface(INSTANCE) + payload(1, b"o" * 80)[:-30])
    feed(new, preface(INSTANCE) + payload(1, b"n" * 60)[:-5])
    feed(old, b"o" * 10)
    feed(new, b"n" * 5)
    assert receiver.outcomes == [(1, None)] and receiver.slots[1][:60] == b"n" * 60
    receiver.slots[1][:] = bytes(SLOT_BYTES)  # lent to somebody else meanwhile
    feed(old, b"o" * 20 + control(b"still in step"))
    assert receiver.outcomes == [(1, None)] and receiver.slots[1] == bytes(SLOT_BYTES)
    assert receiver.frames == [b"still in step"]


def test_a_receive_left_half_filled_stays_posted() -> None:
    receiver = Receiver()
    feed(receiver.connection(), preface(INSTANCE) + payload(1, b"o" * 80)[:-1])
    assert receiver.outcomes == []
    feed(receiver.connection(), preface(INSTANCE) + payload(1, b"n" * 60))
    assert receiver.outcomes == [(1, None)] and receiver.slots[1][:60] == b"n" * 60


def test_a_slot_lent_anew_by_its_own_completion_is_another_receive() -> None:
    receiver = Receiver()
    again: list[Exception | None] = []
    slot = memoryview(bytearray(SLOT_BYTES))
    receiver.inbox.post(5, slot, lambda _exc: receiver.inbox.post(5, slot, again.append))
    feed(receiver.connection(), preface(INSTANCE) + payload(5, b"1" * 10) + payload(5, b"2" * 10))
    assert again == [None] and slot[:10] == b"2" * 10


ADDRESSES = [
    b"tcp://127.0.0.1:1/000102030405060708090a0b0c0d0e0f",
    b"tcp://[::1]:65535/000102030405060708090a0b0c0d0e0f",
    b"tcp://[2001:db8::7]:4000/000102030405060708090a0b0c0d0e0f",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_says_where_and_which(address: bytes) -> None:
    endpoint = parse_address(address)
    assert endpoint.instance == INSTANCE and bytes(endpoint) == address
    assert endpoint == Endpoint(endpoint.host, endpoint.port, INSTANCE)


@pytest.mark.parametrize(
    "host_and_port",
    [
        "localhost:80",
        "example.com:80",
        "127.1:80",
        "0177.0.0.1:80",
        "1.2.3.4.5:80",
        "256.0.0.1:80",
        "0.0.0.0:80",
        "224.0.0.1:80",
        "[::]:80",
        "[ff02::1]:80",
        "::1:80",
        "[::1:80",
        "[0:0:0:0:0:0:0:1]:80",
        "[::FFFF]:80",
        "[fe80::1%lo]:80",
        "127.0.0.1:0",
        "127.0.0.1:080",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:99999999",
        "127.0.0.1:",
        "127.0.0.1",
        " 127.0.0.1:80",
        "127.0.0.1:80\n",
        "127.0.0.1:٣",
        "user@127.0.0.1:80",
    ],
)
def test_an_address_is_a_literal_in_its_one_form_or_unavailable(host_and_port: str) -> None:
    """No names: what a router passes on can make nobody ask a name server."""
    with pytest.raises(Unavailable) as caught:
        parse_address(f"tcp://{host_and_port}/{INSTANCE.hex()}".encode())
    assert caught.value.reason == "handoff_unreachable"


@given(st.binary(max_size=80), st.sampled_from(ADDRESSES), st.integers(0, 60))
def test_a_damaged_address_is_unavailable_or_another_address(damage: bytes, address: bytes, at: int) -> None:
    damaged = address[:at] + damage + address[at + len(damage) :]
    try:
        assert bytes(parse_address(damaged)) == damaged
    except Unavailable as exc:
        assert exc.reason == "handoff_unreachable"
