"""Sources and sinks whose every byte is checkable: block `b` of a transfer is filled with a word made from both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtransfer.expectation import Room
from kvtransfer.sender import Outcome
from splitfire.core.layout import KvLayout
from splitfire.engine.kernels.pack import block_sums
from splitfire.v1 import kv_pb2

LAYOUT = KvLayout("fp32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=16)
FINGERPRINT = b"F" * 32


def content(seed: int, block: int, num_bytes: int) -> bytes:
    return (seed * 1000 + block + 1).to_bytes(8, "little") * (num_bytes // 8)


def sums_of(blocks: memoryview, num_blocks: int) -> list[int]:
    return block_sums(torch.frombuffer(blocks, dtype=torch.uint8), num_blocks)


class FakeSource:
    def __init__(self, seed: int, layout: KvLayout = LAYOUT) -> None:
        self.seed = seed
        self.layout = layout
        self.outcome: Outcome | None = None
        self.num_granted = 0
        self.reason = ""

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        assert self.outcome is None, "its blocks may be gone"
        size = len(payload) // num_blocks
        for i in range(num_blocks):
            payload[i * size : (i + 1) * size] = content(self.seed, first_block + i, size)
        return sums_of(payload, num_blocks) if digest else []

    def granted(self) -> None:
        self.num_granted += 1

    def closed(self, outcome: Outcome, reason: str) -> None:
        assert self.outcome is None, "closed twice"
        self.outcome, self.reason = outcome, reason


class FakeSink:
    def __init__(self, seed: int, first_block: int = 0, num_not_now: int = 0) -> None:
        self.seed = seed
        self.first_block = first_block
        self.num_not_now = num_not_now
        self.written: dict[int, bytes] = {}  # what was published
        self.unpublished: dict[int, bytes] = {}
        self.num_revoked = 0
        self.holds_blocks = False
        self.end = ""
        self.first_tokens: Sequence[kv_pb2.FirstToken] = ()

    def reserve(self) -> int | Room:
        if self.num_not_now:
            self.num_not_now -= 1
            return Room.NOT_NOW
        self.holds_blocks = True
        return self.first_block

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        assert self.holds_blocks and not self.end
        size = len(blocks) // num_blocks
        for i in range(num_blocks):
            assert first_block + i not in self.written
            self.unpublished[first_block + i] = bytes(blocks[i * size : (i + 1) * size])
        return sums_of(blocks, num_blocks)

    def publish(self, first_block: int, num_blocks: int) -> None:
        assert self.holds_blocks and not self.end
        for block in range(first_block, first_block + num_blocks):
            self.written[block] = self.unpublished.pop(block)

    def revoked(self) -> None:
        assert self.holds_blocks and not self.end
        self.holds_blocks = False
        self.written.clear()
        self.unpublished.clear()
        self.num_revoked += 1

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        assert not self.end
        self.end, self.first_tokens = "ready", first_tokens

    def closed(self, reason: str, is_retryable: bool) -> None:
        assert not self.end
        self.end, self.holds_blocks = reason or "no reason", False

    def assert_right(self, num_blocks: int, size: int = LAYOUT.block_bytes) -> None:
        assert self.end == "ready"
        assert self.written == {b: content(self.seed, b, size) for b in range(self.first_block, num_blocks)}
