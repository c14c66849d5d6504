"""The bytes of the tcp transport, parsed before anything is allocated. Pure.

    address   tcp://<IP address>:<port>/<instance>   IPv6 in brackets, instance in 32 hex digits; never a name to look up
    preface   magic "SFKVTCP" | version u8 | instance of the listener it means to reach, 16 bytes
    record    kind u16 | flags u16 = 0 | length u32 | tag u64, 0 for control | `length` bytes

A connection carries one preface and then records, in one direction. The instance is random for each listener, so what was
meant for a former process on the same port is refused.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass

from kvtransfer.frames import MAX_FRAME_BYTES, FrameError
from splitfire.core.errors import Unavailable

MAGIC = b"SFKVTCP"
VERSION = 1
INSTANCE_BYTES = 16
CONTROL, PAYLOAD = 1, 2
_PREFACE = struct.Struct("<7sB16s")
_RECORD = struct.Struct("<HHIQ")
PREFACE_BYTES, HEADER_BYTES = _PREFACE.size, _RECORD.size
_ADDRESS = re.compile(rb"tcp://(?:\[([0-9a-f:.]{2,45})\]|([0-9.]{7,15})):([1-9][0-9]{0,4})/([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a transport listens, and which one it is."""

    host: str  # a literal IP address in its shortest form
    port: int
    instance: bytes

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    def __bytes__(self) -> bytes:
        host = f"[{self.host}]" if self.is_ipv6 else self.host
        return f"tcp://{host}:{self.port}/{self.instance.hex()}".encode()


def parse_address(address: bytes) -> Endpoint:
    """The endpoint that wrote exactly these bytes."""
    found = _ADDRESS.fullmatch(address)
    if found is not None:
        ipv6, ipv4, port, instance = found.groups()
        try:
            ip = ipaddress.ip_address((ipv6 or ipv4).decode())
        except ValueError:
            ip = None
        if ip is not None and not ip.is_unspecified and not ip.is_multicast and int(port) < 1 << 16:
            endpoint = Endpoint(ip.compressed, int(port), bytes.fromhex(instance.decode()))
            if bytes(endpoint) == address:
                return endpoint
    raise Unavailable("the peer's TCP address is damaged", reason="handoff_unreachable")


def preface(instance: bytes) -> bytes:
    return _PREFACE.pack(MAGIC, VERSION, instance)


def check_preface(received: memoryview, instance: bytes) -> None:
    """Checks as much of a preface as has come: what is wrong from its first byte is not waited for."""
    magic = bytes(received[: len(MAGIC)])
    if magic != MAGIC[: len(magic)]:
        raise FrameError("bad_magic")
    if len(received) > len(MAGIC) and received[len(MAGIC)] != VERSION:
        raise FrameError("unsupported_version", f"{received[len(MAGIC)]}, accepted: {VERSION}")
    if len(received) == PREFACE_BYTES and bytes(received[-INSTANCE_BYTES:]) != instance:
        raise FrameError("stale_connection")


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """Says what follows. Its length is within the limit of control; that of a payload is its receive's to check."""

    kind: int
    length: int
    tag: int


def record_header(kind: int, length: int, tag: int) -> bytes:
    return _RECORD.pack(kind, 0, length, tag)


def parse_record_header(data: memoryview) -> RecordHeader:
    kind, flags, length, tag = _RECORD.unpack(data)
    if kind not in (CONTROL, PAYLOAD) or flags or (kind == CONTROL and tag):
        raise FrameError("unknown_kind", f"kind {kind}, flags {flags}, tag {tag}")
    if not length:
        raise FrameError("truncated", "a record without bytes")
    if kind == CONTROL and length > MAX_FRAME_BYTES:
        raise FrameError("too_long", f"{length} bytes, accepted: at most {MAX_FRAME_BYTES}")
    return RecordHeader(kind, length, tag)
