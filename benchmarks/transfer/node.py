"""What one of our two processes can be told to do. Everything happens on its event loop, as on a worker's io thread."""

from __future__ import annotations

import asyncio
import ctypes
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.transfer.boxes import PackedBlocks, SlotBytes, bytes_of
from benchmarks.transfer.cases import BLOCKS, SHAPES, SHIPMENT_BYTES, Path, Shape
from benchmarks.transfer.path import PathEnd, PoolSink, PoolSource
from benchmarks.transfer.timers import Timers
from benchmarks.transfer.wire import Wire
from kvtransfer.agent import AgentOptions
from kvtransfer.peers import PeerAddress
from kvtransfer.transport import SlotMemory
from splitfire.engine.kernels.pack import block_sums
from splitfire.engine.pool import KvPool

RINGS = AgentOptions(send_slots=2, receive_slots=4, slot_bytes=4 << 20)  # a worker's own
SEEDS = {"sending": 1, "receiving": 2}


@dataclass(frozen=True, slots=True)
class Card:
    """How an end is reached."""

    wire: bytes
    agent: PeerAddress


class Node:
    """One end. `run` numbers shipments; both ends are told the same."""

    def __init__(self, role: str) -> None:
        torch.set_num_threads(1)
        self.role = role
        self._wire = Wire()
        self._path = PathEnd(role, RINGS)
        self._sinks: dict[int, PoolSink] = {}

    def card(self) -> Card:
        return Card(self._wire.transport.address, self._path.address)

    def meet(self, other: Card) -> None:
        self._wire.meet(other.wire)
        self._path.meet(other.agent)

    # -- the wire

    async def send_slots(self, run: int, slot_bytes: int, num_slots: int) -> float:
        return await self._wire.send(run, SlotBytes(self._slots(slot_bytes, num_slots)))

    async def receive_slots(self, run: int, slot_bytes: int, num_slots: int) -> float:
        return await self._wire.receive(run, SlotBytes(self._slots(slot_bytes, num_slots)))

    async def send_packed(self, run: int, shape: str, slot_bytes: int, num_slots: int, path: Path) -> float:
        box = PackedBlocks(self._pool(shape, "bf16"), self._ids(SHAPES[shape]), self._slots(slot_bytes, num_slots), path)
        return await self._wire.send(run, box)

    async def receive_packed(self, run: int, shape: str, slot_bytes: int, num_slots: int, path: Path) -> float:
        box = PackedBlocks(self._pool(shape, "bf16"), self._ids(SHAPES[shape]), self._slots(slot_bytes, num_slots), path)
        return await self._wire.receive(run, box)

    # -- the whole path

    def expect(self, run: int, path: Path) -> None:
        layout = replace(BLOCKS.layout, dtype=path.dtype)
        sink = self._sinks[run] = PoolSink(self._pool(BLOCKS.name, path.dtype), self._ids(BLOCKS), path)
        self._path.expect(run, sink, layout, BLOCKS.num_pieces * layout.block_size, digest=path.digest)

    async def ready_at(self, run: int) -> float:
        return await self._sinks.pop(run).ready_at

    async def ship(self, run: int, path: Path) -> float:
        source = PoolSource(self._pool(BLOCKS.name, "bf16"), self._ids(BLOCKS), path)
        return await self._path.ship(run, source, BLOCKS.layout, BLOCKS.num_pieces * BLOCKS.layout.block_size)

    async def ping(self, count: int) -> list[float]:
        return await self._path.ping(count)

    # -- what it is compared with, and what it cost

    def memcpy(self) -> float:
        """Seconds of one copy of the shipment, between memory as a pool has it and of which no cache holds much."""
        source, target = (bytes_of(self._pool(BLOCKS.name, "bf16", copy)).ctypes.data for copy in (1, 2))
        began = time.perf_counter()
        ctypes.memmove(target, source, SHIPMENT_BYTES)
        return time.perf_counter() - began

    async def idle(self, seconds: float) -> float:
        """Share of a core used while nothing happens, in %."""
        before, began = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / (time.perf_counter() - began) * 100

    def measure_parts(self) -> None:
        """From here on, where time goes is counted."""
        self._timers = Timers(self._path.agent)

    def parts(self) -> dict[str, Any]:
        """Microseconds and calls by part since the last time."""
        return self._timers.take()

    def forget(self, shape: str, dtype: str) -> None:
        self._pool(shape, dtype).raw.zero_()

    def sums(self, shape: str, dtype: str) -> list[int]:
        """Of every piece, in the shipment's order: equal at both ends when everything is where it belongs."""
        pool, ids = self._pool(shape, dtype), self._ids(SHAPES[shape])
        return block_sums(torch.from_numpy(bytes_of(pool)[ids].reshape(-1)), len(ids))

    # -- memory, made once

    def _ids(self, shape: Shape) -> list[int]:
        return shape.ids(SEEDS[self.role])

    @cache  # noqa: B019  as long as the process
    def _pool(self, shape: str, dtype: str, copy: int = 0) -> KvPool:
        found = SHAPES[shape]
        pool = KvPool(replace(found.layout, dtype=dtype), 2 * found.num_pieces, torch.device("cpu"))
        if self.role == "sending":
            pool.elements.normal_(generator=torch.Generator().manual_seed(copy))
        return pool

    @cache  # noqa: B019
    def _slots(self, slot_bytes: int, num_slots: int) -> list[SlotMemory]:
        return [self._wire.transport.allocate(slot_bytes) for _ in range(num_slots)]
