"""Names of KV blocks: chained hashes, so that a block's name says everything its content depends on.

SHA-256 over the parent's name and the block's token ids; the chain starts from everything else that changes KV (salt, model
fingerprint, adapter). Router, prefill and decode compute the same names, so an index needs no translation. SHA-256 because
OpenSSL has it in the processor's own instructions: a block of 64 tokens takes 0.4 us, with BLAKE2b 0.55. Ids are hashed in the
machine's byte order, which is little-endian wherever KV goes from one worker to another.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NewType, cast

BlockHash = NewType("BlockHash", bytes)
HASH_BYTES = 32
ID_TYPE = "I"  # 4 bytes on every machine this runs on


def chain_root(salt: bytes, fingerprint: bytes, adapter: str) -> BlockHash:
    """The name before the first block. Lengths are hashed too, so that no two inputs run together; nor does a root with a block,
    which begins with a hash."""
    digest = sha256(b"splitfire-root")
    for part in (salt, fingerprint, adapter.encode()):
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return BlockHash(digest.digest())


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of one full block that follows `parent`."""
    return BlockHash(sha256(parent + array(ID_TYPE, token_ids).tobytes()).digest())


def hash_blocks(root: BlockHash, token_ids: Sequence[int], block_size: int) -> tuple[BlockHash, ...]:
    """The names of every full block of `token_ids`. Packed once for all of them: 13 ns a token from a list or a tuple, 8 from an
    array("I"), at blocks of 64; of that 6.5 are SHA-256 itself."""
    packed = array(ID_TYPE, token_ids[: len(token_ids) // block_size * block_size])
    names: list[bytes] = []
    parent: bytes = root
    for (piece,) in struct.iter_unpack(f"{block_size * packed.itemsize}s", packed):
        parent = sha256(parent + piece).digest()
        names.append(parent)
    return cast(tuple[BlockHash, ...], tuple(names))


def short_name(name: BlockHash) -> int:
    """64 bits of it, as the router's index and cache events name blocks: two that share them cost a cache miss."""
    return int.from_bytes(name[:8], "little")


def short_names(names: Sequence[BlockHash]) -> tuple[int, ...]:
    """`short_name` of each, at once."""
    return struct.unpack("<" + "Q24x" * len(names), b"".join(names))
