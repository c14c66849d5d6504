"""The compiled bodies of ops, for CPUs: a shared library built from the C++ beside this file, when installed with a compiler.

Without it every op runs in torch and means the same. Calls go through ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from torch import Tensor

from splitfire.core.layout import DTYPE_BYTES, KvLayout

VERSION = 2  # of what pack.cpp and this file agree on
MAX_HEAD_DIM = 2048  # TILE of pack.cpp
_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPE_BYTES)}


class _Shape(ctypes.Structure):
    """Twin of pack.cpp's Shape."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "num_rows", "rows_per_side", "block_size", "head_dim", "pool_block_bytes", "payload_block_bytes", "source", "target",
        )
    )  # fmt: skip


def load_library(name: str, version: int) -> ctypes.CDLL | None:
    """The library `name`, if it was built and agrees about the version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                return None
            return library if library.splitfire_version() == version else None
    return None


def _load() -> ctypes.CDLL | None:
    library = load_library("_pack", VERSION)
    if library is None:
        return None
    address, number, numbers = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    sums = ctypes.POINTER(ctypes.c_uint64)
    library.splitfire_pack.argtypes = (ctypes.POINTER(_Shape), address, numbers, number, number, address, address, sums)
    library.splitfire_unpack.argtypes = (number, address, numbers, number, address, address, sums)
    library.splitfire_pack.restype = library.splitfire_unpack.restype = None
    return library


_library = _load()


def is_available() -> bool:
    """Whether the library was built, for this version of the code."""
    return _library is not None


class BlockMover:
    """pack and unpack between one pool layout and one wire layout. What is alike in every call is worked out once."""

    def __init__(self, layout: KvLayout, wire: KvLayout, multipliers: Tensor) -> None:
        """multipliers: [wire.block_bytes / 8] int64, those of the digest."""
        assert self.supports(layout)
        self.wire_block_bytes = wire.block_bytes
        self._multipliers = multipliers
        self._shape = _Shape(
            layout.num_layers * 2 * layout.num_kv_heads, layout.num_kv_heads, layout.block_size, layout.head_dim,
            layout.block_bytes, wire.block_bytes, _NUMBERS[layout.dtype], _NUMBERS[wire.dtype],
        )  # fmt: skip

    @staticmethod
    def supports(layout: KvLayout) -> bool:
        """Rows must be whole words, and a vector must fit a tile."""
        return is_available() and layout.block_size % 8 == 0 and layout.head_dim <= MAX_HEAD_DIM

    def pack(self, pool: Tensor, block_ids: Sequence[int], num_tokens: int, payload: Tensor, digest: bool) -> list[int]:
        """pack.cpp's splitfire_pack. pool and payload: bytes on the CPU, `block_ids` within the pool, the payload of
        len(block_ids) * wire_block_bytes. A sum a block."""
        assert _library is not None
        count = len(block_ids)
        ids, sums = (ctypes.c_int64 * count)(*block_ids), (ctypes.c_uint64 * count)()
        multipliers = self._multipliers.data_ptr() if digest else None
        _library.splitfire_pack(self._shape, pool.data_ptr(), ids, count, num_tokens, payload.data_ptr(), multipliers, sums)
        return list(sums)

    def unpack(self, pool: Tensor, block_ids: Sequence[int], payload: Tensor, digest: bool) -> list[int]:
        """pack.cpp's splitfire_unpack, of layouts that are the same. Otherwise as `pack`."""
        assert _library is not None
        count = len(block_ids)
        ids, sums = (ctypes.c_int64 * count)(*block_ids), (ctypes.c_uint64 * count)()
        multipliers = self._multipliers.data_ptr() if digest else None
        _library.splitfire_unpack(self.wire_block_bytes, pool.data_ptr(), ids, count, payload.data_ptr(), multipliers, sums)
        return list(sums)
