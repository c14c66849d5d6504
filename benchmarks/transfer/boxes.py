"""What the wire carries, three ways: bytes of ring slots, blocks straight between pools, blocks packed into slots."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.transfer import ops
from benchmarks.transfer.cases import SHIPMENT_BYTES, Path
from splitfire.engine.pool import KvPool


def bytes_of(pool: KvPool) -> np.ndarray:
    """[num_blocks, block bytes] of the pool's own memory."""
    return pool.raw.numpy()


class SlotBytes:
    """Whatever lies in the slots, SHIPMENT_BYTES of it: the wire and nothing else."""

    def __init__(self, slots: list[memoryview]) -> None:
        self.num_slots = len(slots)
        self._slots = slots
        self._slot_bytes = len(slots[0])
        self.num_messages = -(-SHIPMENT_BYTES // self._slot_bytes)

    def message(self, number: int, slot: int) -> memoryview:
        return self._slots[slot][: min(self._slot_bytes, SHIPMENT_BYTES - number * self._slot_bytes)]

    room = message

    def arrived(self, number: int, slot: int) -> None:
        pass


class WholeBlocks:
    """A message a block, from pool to pool: no slot, no copy."""

    def __init__(self, pool: KvPool, ids: list[int], num_slots: int) -> None:
        self.num_messages = len(ids)
        self.num_slots = num_slots
        self._blocks = [memoryview(bytes_of(pool)[i]) for i in ids]

    def message(self, number: int, slot: int) -> memoryview:
        return self._blocks[number]

    room = message

    def arrived(self, number: int, slot: int) -> None:
        pass


class PackedBlocks:
    """As many blocks a message as a slot holds, gathered before it goes and scattered when it came."""

    def __init__(self, pool: KvPool, ids: list[int], slots: list[memoryview], path: Path) -> None:
        self._pool = pool
        self._path = path
        self._slots = [torch.frombuffer(slot, dtype=torch.uint8) for slot in slots]
        self._views = slots
        self.num_slots = len(slots)
        self._block_bytes = pool.layout.block_bytes
        per_message = len(slots[0]) // self._block_bytes
        self._batches = [ids[i : i + per_message] for i in range(0, len(ids), per_message)]
        self.num_messages = len(self._batches)

    def message(self, number: int, slot: int) -> memoryview:
        ids = self._batches[number]
        num_bytes = len(ids) * self._block_bytes
        ops.pack(self._path.ops, self._pool, ids, self._path.dtype, self._slots[slot][:num_bytes], digest=self._path.digest)
        return self._views[slot][:num_bytes]

    def room(self, number: int, slot: int) -> memoryview:
        return self._views[slot][: len(self._batches[number]) * self._block_bytes]

    def arrived(self, number: int, slot: int) -> None:
        ids = self._batches[number]
        payload = self._slots[slot][: len(ids) * self._block_bytes]
        ops.unpack(self._path.ops, self._pool, ids, payload, digest=self._path.digest)
