"""Names of blocks: the same from whatever sequence of ids, from router and worker, and as the format says."""

from __future__ import annotations

import struct
from array import array
from hashlib import sha256

import pytest

from splitfire.core.hashing import chain_root, hash_block, hash_blocks, short_name, short_names
from splitfire.v1 import fleet_pb2

ROOT = chain_root(b"salt", b"model", "")
TOKENS = [*range(190), (1 << 21) - 1, 0]


def test_names_are_what_the_format_says() -> None:
    """Written out: the parent's name, then ids of four bytes, little-endian. Who changes this changes it for a whole fleet."""
    root = sha256(b"splitfire-root" + struct.pack("<I4sI5sI", 4, b"salt", 5, b"model", 0)).digest()
    assert root == ROOT
    parent = root
    for i, name in enumerate(hash_blocks(ROOT, TOKENS, 64)):
        parent = sha256(parent + struct.pack("<64I", *TOKENS[64 * i : 64 * i + 64])).digest()
        assert name == parent


@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
def test_a_worker_that_hashes_block_by_block_gets_the_routers_names(block_size: int) -> None:
    names = hash_blocks(ROOT, TOKENS, block_size)
    assert len(names) == len(TOKENS) // block_size
    parent = ROOT
    for i, name in enumerate(names):
        parent = hash_block(parent, TOKENS[i * block_size : (i + 1) * block_size])
        assert name == parent


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128])
def test_names_do_not_depend_on_what_the_ids_came_in(length: int) -> None:
    ids = TOKENS[:length]
    expected = hash_blocks(ROOT, ids, 64)
    assert len(expected) == length // 64
    for same in (
        tuple(ids),
        array("I", ids),
        range(length) if length < 190 else ids,
        fleet_pb2.Submit(prompt_token_ids=ids).prompt_token_ids,
    ):
        assert hash_blocks(ROOT, same, 64) == expected


def test_short_names_are_the_first_eight_bytes() -> None:
    names = hash_blocks(ROOT, TOKENS, 8)
    assert short_names(names) == tuple(map(short_name, names)) == tuple(int.from_bytes(n[:8], "little") for n in names)
    assert short_names(()) == ()
