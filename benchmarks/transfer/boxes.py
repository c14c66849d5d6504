"""What the wire carries: bytes of ring slots and nothing else, or blocks packed into slots and scattered from them."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.transfer import ops
from benchmarks.transfer.cases import SHIPMENT_BYTES, Path
from kvtransfer.transport import SlotMemory
from splitfire.engine.pool import KvPool


def bytes_of(pool: KvPool) -> np.ndarray:
    """[num_blocks, block bytes] of the pool's own memory."""
    return pool.raw.numpy()


class SlotBytes:
    """Whatever lies in the slots, SHIPMENT_BYTES of it: the wire and nothing else."""

    def __init__(self, slots: list[SlotMemory]) -> None:
        self.num_slots = len(slots)
        self._slots = [slot.buffer for slot in slots]
        self._slot_bytes = len(self._slots[0])
        self.num_messages = -(-SHIPMENT_BYTES // self._slot_bytes)

    def message(self, number: int, slot: int) -> memoryview:
        return self._slots[slot][: min(self._slot_bytes, SHIPMENT_BYTES - number * self._slot_bytes)]

    room = message

    def write(self, number: int, room: memoryview) -> None:
        raise AssertionError("it is sent: no key was told")

    def key(self, slot: int) -> bytes:
        return b""

    def arrived(self, number: int, slot: int) -> None:
        pass


class PackedBlocks:
    """As many blocks a message as a slot holds, gathered before it goes and scattered when it came."""

    def __init__(self, pool: KvPool, ids: list[int], slots: list[SlotMemory], path: Path) -> None:
        self._pool = pool
        self._path = path
        self._slots = slots
        self.num_slots = len(slots)
        self._block_bytes = pool.layout.block_bytes
        per_message = len(slots[0].buffer) // self._block_bytes
        self._batches = [ids[i : i + per_message] for i in range(0, len(ids), per_message)]
        self.num_messages = len(self._batches)

    def message(self, number: int, slot: int) -> memoryview:
        self.write(number, self._slots[slot].buffer)
        return self.room(number, slot)

    def write(self, number: int, room: memoryview) -> None:
        ids = self._batches[number]
        payload = torch.frombuffer(room[: len(ids) * self._block_bytes], dtype=torch.uint8)
        ops.pack(self._path.ops, self._pool, ids, self._path.dtype, payload, digest=self._path.digest)

    def room(self, number: int, slot: int) -> memoryview:
        return self._slots[slot].buffer[: len(self._batches[number]) * self._block_bytes]

    def key(self, slot: int) -> bytes:
        return self._slots[slot].key

    def arrived(self, number: int, slot: int) -> None:
        ids = self._batches[number]
        payload = torch.frombuffer(self.room(number, slot), dtype=torch.uint8)
        ops.unpack(self._path.ops, self._pool, ids, payload, digest=self._path.digest)
