"""The paged KV pool: one tensor, block-major, so that a block is one contiguous piece across all layers.

`data` is `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`. Fixed size, and all of
it resident, from the start. Block 0 .. num_blocks-1 are `blocks.py`'s to hand out.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from splitfire.core.layout import KvLayout

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class KvPool:
    """Keys and values of every sequence. Written by `rope_norm_write` and by unpack, read by `attend` and pack."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        # Zeros, not empty: positions past the valid tokens are read (and masked), and NaN * 0 would not be 0.
        shape, dtype = (num_blocks, *layout.block_shape), TORCH_DTYPES[layout.dtype]
        if device.type == "cpu":
            memory = mmap.mmap(-1, num_blocks * layout.block_bytes)
            memory.madvise(mmap.MADV_HUGEPAGE)
            self.data = torch.frombuffer(memory, dtype=dtype).view(shape)
            # Written now, or the first hand-offs pay for the page faults: 10 ms of a 1024-token prompt, seen in
            # benchmarks/serve.py handoff. And a machine without the memory says so at the start, not in the middle.
            self.data.zero_()
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, layer: int) -> Tensor:
        """[num_blocks, 2, num_kv_heads, block_size, head_dim], a view."""
        return self.data[:, layer]
