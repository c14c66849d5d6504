"""Slots that UCX allocates in shared memory, and those of peers, mapped here: UCX's one-sided calls, which ucxx does not wrap.

A payload that is packed straight into the peer's slot crosses the host without being copied; a message through UCX's shared
memory is copied in by one process and out by the other. `ucp_rkey_ptr` says where a peer's memory lies in this process, and
fails where it cannot be mapped: another host, another IPC namespace, no shared memory allowed. io thread only.

Functions and structures: `ucp/api/ucp.h` of UCX 1.9 and later; parameters carry a mask of the fields they have.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import structlog

from kvtransfer.transport import SlotMemory, private_memory
from splitfire.core.limits import MAX_SLOT_BYTES, MAX_SLOT_KEY_BYTES

log = structlog.get_logger("worker")
_KEY = struct.Struct("<QQ8s")  # address at its owner, size, checksum; UCX's remote key follows
MAX_REACHED = 256  # slots of one peer; what it lends beyond them is sent to
_FIELD_ADDRESS, _FIELD_LENGTH, _FIELD_FLAGS, _ALLOCATE = 1, 2, 4, 2


class _MapParams(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported_memh_buffer", ctypes.c_void_p),
    )


class _MemoryAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("memory_type", ctypes.c_int),
        ("system_device", ctypes.c_uint8),
    )


def _library() -> ctypes.CDLL:
    """The libucp that ucxx has loaded. The handles in ucxx's objects are of this library and no other."""
    library = ctypes.CDLL("libucp.so.0")
    handle, size = ctypes.c_void_p, ctypes.c_size_t
    library.ucp_mem_map.argtypes = (handle, ctypes.POINTER(_MapParams), ctypes.POINTER(handle))
    library.ucp_mem_query.argtypes = (handle, ctypes.POINTER(_MemoryAttributes))
    library.ucp_mem_unmap.argtypes = (handle, handle)
    library.ucp_rkey_pack.argtypes = (handle, handle, ctypes.POINTER(handle), ctypes.POINTER(size))
    library.ucp_rkey_buffer_release.argtypes = (handle,)
    library.ucp_rkey_buffer_release.restype = None
    library.ucp_ep_rkey_unpack.argtypes = (handle, ctypes.c_char_p, ctypes.POINTER(handle))
    library.ucp_rkey_ptr.argtypes = (handle, ctypes.c_uint64, ctypes.POINTER(handle))
    library.ucp_rkey_destroy.argtypes = (handle,)
    library.ucp_rkey_destroy.restype = None
    return library


class OwnMemory:
    """Allocates the slots of one `libucxx.UCXContext`, which lives as long as any of them."""

    def __init__(self, context: Any) -> None:
        self._library = _library()
        self._context = context

    def allocate(self, num_bytes: int) -> SlotMemory:
        """Resident shared memory with its key; private memory without one where UCX has none to give."""
        params = _MapParams(_FIELD_LENGTH | _FIELD_FLAGS, None, num_bytes, _ALLOCATE)
        handle = ctypes.c_void_p()
        found = _MemoryAttributes(_FIELD_ADDRESS | _FIELD_LENGTH)
        status = self._library.ucp_mem_map(self._context.handle, params, handle)
        if status != 0 or self._library.ucp_mem_query(handle, found) != 0:
            log.warning("UCX has no shared memory for a slot; payloads are copied", bytes=num_bytes)
            return SlotMemory(private_memory(num_bytes))
        array = (ctypes.c_uint8 * num_bytes).from_address(found.address)
        ctypes.memset(found.address, 0, num_bytes)  # faults its pages in now, not under the first hand-off
        weakref.finalize(array, _unmap, self._library, self._context, handle).atexit = False
        return SlotMemory(memoryview(array).cast("B"), self._key(handle, found.address, num_bytes))

    def _key(self, handle: ctypes.c_void_p, address: int, num_bytes: int) -> bytes:
        packed, size = ctypes.c_void_p(), ctypes.c_size_t()
        if self._library.ucp_rkey_pack(self._context.handle, handle, packed, size) != 0:
            return b""
        rkey = ctypes.string_at(packed, size.value)
        self._library.ucp_rkey_buffer_release(packed)
        return _KEY.pack(address, num_bytes, _checksum(address, num_bytes, rkey)) + rkey


@dataclass(frozen=True, slots=True)
class _Reached:
    """A peer's slot; `view` is None where it cannot be mapped."""

    rkey: ctypes.c_void_p | None
    view: memoryview | None


class PeerMemory:
    """Slots of the peer at one endpoint, each mapped on first use."""

    def __init__(self, endpoint: Any) -> None:
        self._library = _library()
        self._endpoint = endpoint
        self._reached: dict[bytes, _Reached] = {}

    def view(self, key: bytes) -> memoryview | None:
        reached = self._reached.get(key)
        if reached is None:
            if len(self._reached) >= MAX_REACHED:
                return None
            reached = self._reached[key] = self._reach(key)
        return reached.view

    def close(self) -> None:
        """Nothing is mapped any more; views that were given are dead."""
        for reached in self._reached.values():
            if reached.rkey is not None:
                self._library.ucp_rkey_destroy(reached.rkey)
        self._reached.clear()

    def _reach(self, key: bytes) -> _Reached:
        """UCX trusts what it is given, so a damaged key does not get that far."""
        if not _KEY.size < len(key) <= MAX_SLOT_KEY_BYTES:
            return _Reached(None, None)
        address, num_bytes, checksum = _KEY.unpack_from(key)
        packed = key[_KEY.size :]
        if checksum != _checksum(address, num_bytes, packed) or not 0 < num_bytes <= MAX_SLOT_BYTES:
            return _Reached(None, None)
        rkey, pointer = ctypes.c_void_p(), ctypes.c_void_p()
        if self._library.ucp_ep_rkey_unpack(self._endpoint.handle, packed, rkey) != 0:
            return _Reached(None, None)
        if self._library.ucp_rkey_ptr(rkey, address, pointer) != 0:
            self._library.ucp_rkey_destroy(rkey)
            return _Reached(None, None)
        return _Reached(rkey, memoryview((ctypes.c_uint8 * num_bytes).from_address(pointer.value)).cast("B"))


def _checksum(address: int, num_bytes: int, rkey: bytes) -> bytes:
    return blake2b(struct.pack("<QQ", address, num_bytes) + rkey, digest_size=8).digest()


def _unmap(library: ctypes.CDLL, context: Any, handle: ctypes.c_void_p) -> None:
    library.ucp_mem_unmap(context.handle, handle)
