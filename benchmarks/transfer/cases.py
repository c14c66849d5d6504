"""What is shipped: the KV of 2048 tokens of the shape `smol135`, 47 MB, laid out in two ways."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from splitfire.core.layout import KvLayout

MIB = 1 << 20
LAYOUT = KvLayout("bf16", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16)
NUM_BLOCKS = 128
SHIPMENT_BYTES = NUM_BLOCKS * LAYOUT.block_bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_pieces` pieces of one shipment, each contiguous, at random places of a pool with room for twice as many."""

    name: str
    layout: KvLayout
    num_pieces: int

    def ids(self, seed: int) -> list[int]:
        """Where the pieces lie; sender and receiver draw with different seeds."""
        return random.Random(seed).sample(range(2 * self.num_pieces), self.num_pieces)


BLOCKS = Shape(f"{NUM_BLOCKS} x {LAYOUT.block_bytes} bytes", LAYOUT, NUM_BLOCKS)
# What a pool that is not block-major has: one piece a layer and block. To pack it is a pool of small blocks.
_PIECE = replace(LAYOUT, num_layers=1)
PIECES = Shape(
    f"{LAYOUT.num_layers * NUM_BLOCKS} x {_PIECE.block_bytes} bytes", _PIECE, LAYOUT.num_layers * NUM_BLOCKS
)  # fmt: skip
SHAPES = {shape.name: shape for shape in (BLOCKS, PIECES)}


@dataclass(frozen=True, slots=True)
class Path:
    """How the whole path is asked to go."""

    ops: str
    dtype: str  # of the receiver's pool
    digest: bool
