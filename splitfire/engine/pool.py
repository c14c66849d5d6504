"""The paged KV pool: one piece of memory, block-major, so that a block is one contiguous piece across all layers.

`raw` is `[num_blocks, block_bytes]` of bytes; elements and scales are views of it, laid out as core/layout.py says. Fixed
size, and all of it resident, from the start. Block 0 .. num_blocks-1 are `blocks.py`'s to hand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.layout import KvLayout
from splitfire.engine import memory
from splitfire.engine.blocks import BlockCopy

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer of the pool: views, written by `rope_norm_write` and read by `attend`."""

    elements: Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim], the pool's dtype
    scales: Tensor | None  # [num_blocks, 2, num_kv_heads, block_size] fp16 when the pool is quantised


class KvPool:
    """Keys and values of every sequence. Written by `rope_norm_write` and by unpack, read by `attend` and pack."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device, raw: Tensor | None = None) -> None:
        """raw [num_blocks, block_bytes] uint8: the memory, where it is somebody else's."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        # Zeros, not empty: positions past the valid tokens are read (and masked), and NaN * 0 would not be 0.
        if raw is not None:
            self.raw = raw
        elif device.type == "cpu":
            # Resident now, or the first hand-offs pay for the page faults: 10 ms of a 1024-token prompt, seen in
            # `python -m benchmarks.serve handoff`.
            self.raw = memory.zeros(num_blocks * layout.block_bytes).view(num_blocks, -1)
        else:
            self.raw = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8, device=device)
        self.elements = elements_of(self.raw, layout)
        self.scales = scales_of(self.raw, layout) if layout.is_quantised else None

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """All layers of some blocks to others."""
        for copy in copies:  # one by one: on a GPU a list of ids would be sent there, and waited for
            self.raw[copy.target].copy_(self.raw[copy.source])

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.elements[:, layer], None if self.scales is None else self.scales[:, layer])


def elements_of(raw: Tensor, layout: KvLayout) -> Tensor:
    """raw [num_blocks, block_bytes] uint8 -> [num_blocks, *block_shape] in the layout's dtype, a view."""
    return raw[:, : layout.scale_offset].view(TORCH_DTYPES[layout.dtype]).view(raw.shape[0], *layout.block_shape)


def scales_of(raw: Tensor, layout: KvLayout) -> Tensor:
    """raw [num_blocks, block_bytes] uint8 of a quantised layout -> [num_blocks, *scales_shape] fp16, a view."""
    return raw[:, layout.scale_offset : layout.content_bytes].view(torch.float16).view(raw.shape[0], *layout.scales_shape)
