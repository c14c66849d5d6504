"""How a KV block is laid out: the shape arithmetic that pool, pack and wire share. Pure numbers, no tensors.

A block holds `block_size` tokens of every layer, keys and values, in one contiguous piece:
`[num_layers, 2, num_kv_heads, block_size, head_dim]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
BLOCK_ALIGN = 64  # block strides are a multiple of this, so that every block starts on a cache line


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One worker's block. Two layouts that differ only in `dtype` hold the same KV."""

    dtype: str  # a key of DTYPE_BYTES
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def elements_per_block(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next; a multiple of BLOCK_ALIGN because block sizes and head sizes are even."""
        return self.elements_per_block * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def converts_to(self, other: KvLayout) -> bool:
        """Whether pack can turn one into the other: same KV, any two known dtypes."""
        return replace(self, dtype=other.dtype) == other and {self.dtype, other.dtype} <= DTYPE_BYTES.keys()
