"""How a KV block is laid out: the shape arithmetic that pool, pack and wire share. Pure numbers, no tensors.

A block holds `block_size` tokens of every layer, keys and values, in one contiguous piece. First its elements,
`[num_layers, 2, num_kv_heads, block_size, head_dim]`; then, in a quantised block, one fp16 scale for each of their vectors,
`[num_layers, 2, num_kv_heads, block_size]`; then zeros up to a multiple of BLOCK_ALIGN. Keys come before values, with their rotary
embedding in them; a quantised block holds the Hadamard transform of each key (engine/kernels/quantise.py), values as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Bytes an element. A dtype's place in this table is its number on the wire (kvtransfer/frames.py): append only.
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8_e4m3": 1}
QUANTISED = frozenset({"int8", "fp8_e4m3"})
SCALE_BYTES = 2  # fp16
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
    def is_quantised(self) -> bool:
        return self.dtype in QUANTISED

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of the elements."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def scales_shape(self) -> tuple[int, int, int, int]:
        return self.block_shape[:4]

    @property
    def elements_per_block(self) -> int:
        return self.vectors_per_block * self.head_dim

    @property
    def vectors_per_block(self) -> int:
        """Keys and values of one head and one token each; a quantised block has as many scales."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size

    @property
    def num_scales(self) -> int:
        return self.vectors_per_block if self.is_quantised else 0

    @property
    def scale_offset(self) -> int:
        """Where the elements end, in bytes: the scales begin there if there are any."""
        return self.elements_per_block * DTYPE_BYTES[self.dtype]

    @property
    def content_bytes(self) -> int:
        """Elements and scales, without the padding."""
        return self.scale_offset + self.num_scales * SCALE_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next; a multiple of BLOCK_ALIGN."""
        return -(-self.content_bytes // BLOCK_ALIGN) * BLOCK_ALIGN

    @property
    def token_bytes(self) -> int:
        """A token's share of a block, padding included."""
        return self.block_bytes // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def converts_to(self, other: KvLayout) -> bool:
        """Whether pack can turn one into the other: same KV, any two known dtypes."""
        return replace(self, dtype=other.dtype) == other and {self.dtype, other.dtype} <= DTYPE_BYTES.keys()
