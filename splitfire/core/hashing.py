"""Names of KV blocks: chained hashes, so that a block's name says everything its content depends on.

BLAKE2b-256 over the parent's name and the block's token ids; the chain starts from everything else that changes KV
(salt, model fingerprint, adapter). Router, prefill and decode compute the same names, so an index needs no translation.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
HASH_BYTES = 32


def chain_root(salt: bytes, fingerprint: bytes, adapter: str) -> BlockHash:
    """The name before the first block. Lengths are hashed too, so that no two inputs run together."""
    parts = (salt, fingerprint, adapter.encode())
    digest = blake2b(digest_size=HASH_BYTES, person=b"splitfire-root")
    for part in parts:
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return BlockHash(digest.digest())


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of one full block that follows `parent`."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return BlockHash(blake2b(parent + packed, digest_size=HASH_BYTES, person=b"splitfire-block").digest())


def hash_blocks(root: BlockHash, token_ids: Sequence[int], block_size: int) -> tuple[BlockHash, ...]:
    """The names of every full block of `token_ids`."""
    names = []
    parent = root
    for begin in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[begin : begin + block_size])
        names.append(parent)
    return tuple(names)
