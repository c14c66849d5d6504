"""The bytes of the KV wire: fixed headers, parsed before anything is allocated. Pure.

    frame    magic "SFKV" | version u8 | kind u8 | flags u16 = 0 | length u32 | sender incarnation 16 bytes
             | link u32 | sequence u32 | 4 zero bytes
    payload  frame, then the fields of PayloadHeader, then a u64 digest a block, padding to 64 bytes, then the blocks

`length` counts what follows the 40 bytes of the frame. Control frames of one link count up from 1, so that what is repeated
can be told, and what is missing seen; in payloads both numbers are 0, their slot's generation tells. Whatever is not
exactly as written here is a FrameError whose reason names it; the frame is dropped and the transfer, if it can be told, fails.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

from google.protobuf.message import DecodeError

from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.limits import MAX_CONTROL_BYTES
from splitfire.v1 import kv_pb2

MAGIC = b"SFKV"
VERSION = 1
CONTROL, PAYLOAD, VOID = 1, 2, 3
DIGEST_SUM64, DIGEST_OFF = 1, 255  # off only where the receiver's settings say so, never by leaving something out
DIGESTS = (DIGEST_SUM64, DIGEST_OFF)
TARGET_CACHE = 0  # cache id of the model itself; 1 is for a draft model's
ALIGN = 64
_FRAME = struct.Struct("<4sBBHI16sII4x")
_PAYLOAD = struct.Struct("<8s16sIIBBBxHHHHIIIIQ")
MAX_FRAME_BYTES = _FRAME.size + MAX_CONTROL_BYTES  # of control
_DTYPES = tuple(DTYPE_BYTES)
_MASK = (1 << 64) - 1


class FrameError(Exception):
    """Bytes that are not a frame of ours. `reason` is stable: bad_magic, unsupported_version, truncated, ..."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose header was found right. `body` points into what was received."""

    kind: int
    incarnation: bytes  # of the sender
    link: int
    sequence: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class PayloadHeader:
    """Says what the bytes are. Blocks are logical: nothing on the wire names a pool block."""

    fingerprint: bytes  # first 8 bytes of the model fingerprint's digest
    transfer_id: bytes
    slot: int
    generation: int  # of the slot
    cache_id: int
    dtype: str
    digest_algorithm: int
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    block_start: int
    block_end: int
    num_tokens: int  # valid ones in these blocks
    block_bytes: int
    payload_bytes: int

    @property
    def num_blocks(self) -> int:
        return self.block_end - self.block_start


def control_frame(incarnation: bytes, link: int, sequence: int, message: kv_pb2.KvMessage) -> bytes:
    body = message.SerializeToString()
    assert len(body) <= MAX_CONTROL_BYTES, len(body)
    return _FRAME.pack(MAGIC, VERSION, CONTROL, 0, len(body), incarnation, link, sequence) + body


def parse_frame(data: memoryview) -> Frame:
    """A frame whose length fits exactly, for control, and at most, for a slot that is longer than what arrived in it."""
    if len(data) < _FRAME.size:
        raise FrameError("truncated", f"{len(data)} bytes, a frame has at least {_FRAME.size}")
    magic, version, kind, flags, length, incarnation, link, sequence = _FRAME.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("bad_magic")
    if version != VERSION:
        raise FrameError("unsupported_version", f"{version}, accepted: {VERSION}")
    if kind not in (CONTROL, PAYLOAD, VOID) or flags:
        raise FrameError("unknown_kind", f"kind {kind}, flags {flags}")
    if kind == CONTROL and length > MAX_CONTROL_BYTES:
        raise FrameError("too_long", f"{length} bytes, accepted: at most {MAX_CONTROL_BYTES}")
    if length > len(data) - _FRAME.size:
        raise FrameError("truncated", f"says {length} bytes, has {len(data) - _FRAME.size}")
    if kind == CONTROL and length < len(data) - _FRAME.size:
        raise FrameError("trailing_bytes")
    return Frame(kind, incarnation, link, sequence, data[_FRAME.size : _FRAME.size + length])


def parse_control(body: memoryview) -> kv_pb2.KvMessage:
    """One message with exactly one known body (must-understand)."""
    message = kv_pb2.KvMessage()
    try:
        message.ParseFromString(bytes(body))
    except DecodeError as exc:
        raise FrameError("bad_message") from exc
    if message.WhichOneof("body") is None:
        raise FrameError("unknown_message")
    return message


def data_offset(num_blocks: int) -> int:
    """Where the blocks begin in a payload of `num_blocks`."""
    return -(-(_FRAME.size + _PAYLOAD.size + 8 * num_blocks) // ALIGN) * ALIGN


def front_bytes(message: memoryview) -> int:
    """How much of a message stands before its blocks, by what it says of itself; never more than there is of it."""
    if len(message) < _FRAME.size + _PAYLOAD.size or _FRAME.unpack_from(message)[2] != PAYLOAD:
        return min(len(message), _FRAME.size)
    header = PayloadHeader(*_PAYLOAD.unpack_from(message, _FRAME.size))
    return min(len(message), data_offset(max(0, header.num_blocks)))


def blocks_per_slot(slot_bytes: int, block_bytes: int) -> int:
    """How many blocks fit one slot, headers included; 0 when not even one does."""
    count = slot_bytes // (block_bytes + 8)
    while count and data_offset(count) + count * block_bytes > slot_bytes:
        count -= 1
    return count


def slot_bytes_for(block_bytes: int) -> int:
    """The smallest slot that holds one block of this size."""
    return data_offset(1) + block_bytes


def write_payload(slot: memoryview, incarnation: bytes, header: PayloadHeader, digests: list[int]) -> int:
    """Writes everything before the blocks into `slot`; the blocks are there already. Length of the whole message."""
    begin = data_offset(header.num_blocks)
    total = begin + header.payload_bytes
    _FRAME.pack_into(slot, 0, MAGIC, VERSION, PAYLOAD, 0, total - _FRAME.size, incarnation, 0, 0)
    _PAYLOAD.pack_into(
        slot,
        _FRAME.size,
        header.fingerprint,
        header.transfer_id,
        header.slot,
        header.generation,
        header.cache_id,
        _DTYPES.index(header.dtype),
        header.digest_algorithm,
        header.layer_start,
        header.layer_end,
        header.head_start,
        header.head_end,
        header.block_start,
        header.block_end,
        header.num_tokens,
        header.block_bytes,
        header.payload_bytes,
    )
    struct.pack_into(f"<{len(digests)}Q", slot, _FRAME.size + _PAYLOAD.size, *digests)
    return total


def write_void(slot: memoryview, incarnation: bytes, length: int = _FRAME.size) -> int:
    """A message of `length` bytes that only gives a lent slot back, or measures."""
    _FRAME.pack_into(slot, 0, MAGIC, VERSION, VOID, 0, length - _FRAME.size, incarnation, 0, 0)
    return length


@dataclass(frozen=True, slots=True)
class Payload:
    """A parsed payload: nothing is verified yet but sizes."""

    header: PayloadHeader
    digests: tuple[int, ...]
    blocks: memoryview


def parse_payload(body: memoryview) -> Payload:
    """Header, digests and blocks of a payload frame's body; every size is checked against what is there."""
    if len(body) < _PAYLOAD.size:
        raise FrameError("truncated", "payload header")
    values = list(_PAYLOAD.unpack_from(body))
    if values[5] >= len(_DTYPES):
        raise FrameError("bad_dtype", str(values[5]))
    values[5] = _DTYPES[values[5]]
    header = PayloadHeader(*values)
    if header.digest_algorithm not in DIGESTS:
        raise FrameError("unknown_digest", str(header.digest_algorithm))
    if not header.block_start < header.block_end:
        raise FrameError("bad_block_range", f"[{header.block_start}, {header.block_end})")
    if header.payload_bytes != header.num_blocks * header.block_bytes:
        raise FrameError("size_mismatch", f"{header.payload_bytes} bytes for {header.num_blocks} blocks of {header.block_bytes}")
    begin = data_offset(header.num_blocks) - _FRAME.size
    if len(body) != begin + header.payload_bytes:
        raise FrameError("size_mismatch", f"{len(body)} bytes, the header says {begin + header.payload_bytes}")
    digests = struct.unpack_from(f"<{header.num_blocks}Q", body, _PAYLOAD.size)
    return Payload(header, digests, body[begin:])


def check_layout(header: PayloadHeader, layout: KvLayout) -> None:
    """The payload holds whole blocks of `layout`: all layers, all heads, its dtype and size."""
    if (header.layer_start, header.layer_end) != (0, layout.num_layers):
        raise FrameError("bad_layer_range", f"[{header.layer_start}, {header.layer_end}) of {layout.num_layers}")
    if (header.head_start, header.head_end) != (0, layout.num_kv_heads):
        raise FrameError("bad_head_range", f"[{header.head_start}, {header.head_end}) of {layout.num_kv_heads}")
    if header.dtype != layout.dtype:
        raise FrameError("bad_dtype", f"{header.dtype}, granted: {layout.dtype}")
    if header.block_bytes != layout.block_bytes:
        raise FrameError("size_mismatch", f"blocks of {header.block_bytes} bytes, granted: {layout.block_bytes}")
    if not (header.num_blocks - 1) * layout.block_size < header.num_tokens <= header.num_blocks * layout.block_size:
        raise FrameError("bad_token_count", str(header.num_tokens))


def bind(header: PayloadHeader, sums: list[int]) -> list[int]:
    """Digests of kv.proto: the data's sums plus a number that ties each to transfer, generation, block and format.
    Zeros where the digest is off."""
    if header.digest_algorithm == DIGEST_OFF:
        return [0] * header.num_blocks
    digests = []
    for block, block_sum in enumerate(sums, header.block_start):
        key = header.transfer_id + struct.pack("<IIB", header.generation, block, header.cache_id) + header.dtype.encode()
        digests.append((block_sum + int.from_bytes(blake2b(key, digest_size=8).digest(), "little")) & _MASK)
    return digests
