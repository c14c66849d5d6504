"""Group C of bad inputs: the KV wire's headers, byte by byte. A frame is exactly right or it is dropped by a stable reason."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import frames
from kvtransfer.frames import (
    FrameError,
    PayloadHeader,
    bind,
    blocks_per_slot,
    check_layout,
    control_frame,
    data_offset,
    parse_control,
    parse_frame,
    parse_payload,
    slot_bytes_for,
    write_payload,
    write_void,
)
from splitfire.core.limits import MAX_CONTROL_BYTES
from splitfire.v1 import kv_pb2
from tests.kvtransfer.fakes import LAYOUT

ME = b"i" * 16
HEADER = PayloadHeader(
    fingerprint=b"f" * 8, transfer_id=b"t" * 16, slot=3, generation=7, cache_id=0, dtype="fp32", digest_algorithm=1, layer_start=0, layer_end=2,
    head_start=0, head_end=2, block_start=4, block_end=6, num_tokens=20, block_bytes=LAYOUT.block_bytes, payload_bytes=2 * LAYOUT.block_bytes,
)  # fmt: skip


def payload_message(header: PayloadHeader = HEADER, digests: tuple[int, ...] = (11, 12)) -> bytearray:
    slot = bytearray(data_offset(2) + header.payload_bytes)
    length = write_payload(memoryview(slot), ME, header, list(digests))
    return slot[:length]


def reason(parse: Callable[[], object]) -> str:
    with pytest.raises(FrameError) as caught:
        parse()
    return caught.value.reason


def parse(data: bytes | bytearray) -> object:
    frame = parse_frame(memoryview(data))
    return parse_control(frame.body) if frame.kind == frames.CONTROL else parse_payload(frame.body)


def test_what_is_written_is_read() -> None:
    frame = parse_frame(memoryview(payload_message()))
    assert (frame.kind, frame.incarnation) == (frames.PAYLOAD, ME)
    payload = parse_payload(frame.body)
    assert payload.header == HEADER
    assert payload.digests == (11, 12)
    assert len(payload.blocks) == HEADER.payload_bytes
    message = kv_pb2.KvMessage(transfer_id=b"t" * 16, want=kv_pb2.Want(bytes=5, num_slots=1))
    frame = parse_frame(memoryview(control_frame(ME, 3, 9, message)))
    assert (frame.incarnation, frame.link, frame.sequence) == (ME, 3, 9)
    assert parse_control(frame.body) == message


def test_a_slot_longer_than_its_message_is_fine_for_payloads() -> None:
    assert parse_payload(parse_frame(memoryview(payload_message() + bytes(100))).body).header == HEADER


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (0, b"XFKV", "bad_magic"),  # B64
        (0, b"\x80\x04\x95K", "bad_magic"),  # B87: a pickle
        (0, b'{"a"', "bad_magic"),
        (0, b"\x82\xa1a\xc7", "bad_magic"),  # msgpack with an extension
        (4, b"\x00", "unsupported_version"),  # B64
        (4, b"\xff", "unsupported_version"),
        (5, b"\x00", "unknown_kind"),  # B68
        (5, b"\x09", "unknown_kind"),
        (6, b"\x01", "unknown_kind"),  # a flag; there is none for another byte order either (B86)
        (8, struct.pack("<I", 0), "truncated"),  # B65
        (8, struct.pack("<I", 3), "truncated"),
        (8, struct.pack("<I", 2**32 - 1), "truncated"),
    ],
)
def test_a_wrong_frame_header(at: int, value: bytes, expected: str) -> None:
    message = payload_message()
    message[at : at + len(value)] = value
    assert reason(lambda: parse(message)) == expected


def test_truncation_at_every_byte_is_seen() -> None:
    """B66."""
    message = payload_message()
    for length in [*range(300), len(message) - 1]:
        assert reason(lambda length=length: parse(message[:length])) in ("truncated", "size_mismatch")  # type: ignore[misc]


def test_trailing_bytes_after_a_control_message() -> None:
    """B67."""
    frame = control_frame(ME, 1, 1, kv_pb2.KvMessage(received=kv_pb2.Received()))
    assert reason(lambda: parse(frame + b"x")) == "trailing_bytes"


def test_control_messages_are_bounded_and_must_be_understood() -> None:
    too_long = frames._FRAME.pack(b"SFKV", 1, 1, 0, MAX_CONTROL_BYTES + 1, ME, 1, 1) + bytes(MAX_CONTROL_BYTES + 1)
    assert reason(lambda: parse(too_long)) == "too_long"
    empty = control_frame(ME, 1, 1, kv_pb2.KvMessage(transfer_id=b"t"))
    assert reason(lambda: parse(empty)) == "unknown_message"
    broken = frames._FRAME.pack(b"SFKV", 1, 1, 0, 3, ME, 1, 1) + b"\xff\xff\xff"
    assert reason(lambda: parse(broken)) == "bad_message"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"block_start": 6}, "bad_block_range"),  # B71
        ({"block_start": 9}, "bad_block_range"),
        ({"payload_bytes": 2 * LAYOUT.block_bytes - 8}, "size_mismatch"),  # B72
        ({"block_end": 2**32 - 1}, "size_mismatch"),  # B73
        ({"block_bytes": 0}, "size_mismatch"),
        ({"block_bytes": 2**32 - 1}, "size_mismatch"),
        ({"payload_bytes": 2**63}, "size_mismatch"),
        ({"payload_bytes": 2**64 - 1}, "size_mismatch"),
        ({"block_end": 2**32 - 1, "block_bytes": 0, "payload_bytes": 0}, "size_mismatch"),  # the product is right
        ({"digest_algorithm": 0}, "unknown_digest"),  # B74
        ({"digest_algorithm": 9}, "unknown_digest"),
    ],
)
def test_a_wrong_payload_header(change: dict[str, int], expected: str) -> None:
    message = payload_message()
    wrong = replace(HEADER, **change)  # type: ignore[arg-type]
    values = [getattr(wrong, name) for name in PayloadHeader.__slots__]
    values[5] = 2
    struct.pack_into(frames._PAYLOAD.format, message, frames._FRAME.size, *values)
    assert reason(lambda: parse(message)) == expected


def test_an_unknown_dtype() -> None:
    """B86."""
    message = payload_message()
    message[frames._FRAME.size + 8 + 16 + 4 + 4 + 1] = 200
    assert reason(lambda: parse(message)) == "bad_dtype"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layer_start": 1}, "bad_layer_range"),  # B71
        ({"layer_start": 2, "layer_end": 1}, "bad_layer_range"),
        ({"layer_start": 0, "layer_end": 0}, "bad_layer_range"),
        ({"layer_end": 1}, "bad_layer_range"),
        ({"layer_end": 3}, "bad_layer_range"),
        ({"head_end": 1}, "bad_head_range"),
        ({"dtype": "bf16"}, "bad_dtype"),
        ({"block_bytes": 64}, "size_mismatch"),
        ({"num_tokens": 0}, "bad_token_count"),
        ({"num_tokens": 16}, "bad_token_count"),
        ({"num_tokens": 33}, "bad_token_count"),
    ],
)
def test_a_payload_of_another_layout(change: dict[str, object], expected: str) -> None:
    check_layout(HEADER, LAYOUT)
    assert reason(lambda: check_layout(replace(HEADER, **change), LAYOUT)) == expected  # type: ignore[arg-type]


def test_digests_are_bound_to_transfer_generation_block_and_format() -> None:
    """F38, F39: right bytes in the wrong place, or of another lending, have another digest."""
    sums = [5, 5]
    clean = bind(HEADER, sums)
    assert clean[0] != clean[1]
    for change in (
        {"transfer_id": b"u" * 16},
        {"generation": 8},
        {"block_start": 5, "block_end": 7},
        {"cache_id": 1},
        {"dtype": "bf16"},
    ):
        assert not set(bind(replace(HEADER, **change), sums)[:1]) & set(clean[:1])


@given(st.integers(64, 1 << 20), st.integers(8, 1 << 16).map(lambda n: n * 8))
def test_what_is_said_to_fit_a_slot_fits(slot_bytes: int, block_bytes: int) -> None:
    count = blocks_per_slot(slot_bytes, block_bytes)
    if count:
        assert data_offset(count) + count * block_bytes <= slot_bytes
    assert data_offset(count + 1) + (count + 1) * block_bytes > slot_bytes
    assert blocks_per_slot(slot_bytes_for(block_bytes), block_bytes) == 1


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_never_taken_for_a_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        parse(data)


def test_a_message_with_random_damage_is_dropped_or_parsed_but_never_crashes() -> None:
    draw = random.Random(5)
    for _ in range(3000):
        message = payload_message()
        for _ in range(draw.randint(1, 4)):
            message[draw.randrange(len(message))] = draw.randrange(256)
        try:
            parse(message)
        except FrameError:
            pass


def test_a_void_fits_any_slot() -> None:
    slot = bytearray(64)
    length = write_void(memoryview(slot), ME)
    assert parse_frame(memoryview(slot)).kind == frames.VOID
    assert length <= 64
