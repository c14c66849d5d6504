"""One end of a hand-off on one GPU: a worker's pool, transport and agent, told over a pipe what to do.

The path is a worker's own: slots on the device, a shipment that is told chunk by chunk what is computed, and pack and unpack on the
hand-off stream, as prefill_svc/ship.py and decode_svc/intake.py have them. Everything happens on the event loop, as on an io thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import uvloop

from benchmarks.gpu.handoff_ends import Setup
from benchmarks.orders import obey
from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.expectation import Expectation, Room
from kvtransfer.frames import slot_bytes_for
from kvtransfer.peers import PeerAddress
from kvtransfer.probe import PairRates
from kvtransfer.sender import Outcome, Shipment
from splitfire.core.errors import ConfigError
from splitfire.core.flags import parse_settings
from splitfire.core.process import end_with_parent
from splitfire.core.settings import WorkerSettings
from splitfire.engine.device.handoff import on_handoff_stream
from splitfire.engine.kernels.pack import block_sums, pack_reference
from splitfire.engine.parallel.pack import pack, unpack
from splitfire.engine.pool import KvPool
from splitfire.v1 import kv_pb2
from splitfire.worker.transports import open_transport, slot_tensor

FINGERPRINT, TOKEN = b"F" * 32, b"t" * 16
POISON = 0xEE
SEEDS = {"prefill": 1, "decode": 2}
CPU = torch.device("cpu")


class PoolSource:
    """The blocks of a pool, as a prefill worker ships them. `began` is the instant of the first pack."""

    def __init__(self, pool: KvPool, ids: Sequence[int], num_tokens: int) -> None:
        self._pool, self._ids, self._num_tokens = pool, ids, num_tokens
        self.began: float | None = None
        self.closed_as: asyncio.Future[tuple[Outcome, str]] = asyncio.get_running_loop().create_future()

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        self.began = self.began or time.perf_counter()
        block_size, ids = self._pool.layout.block_size, self._ids[first_block : first_block + num_blocks]
        num_tokens = min(self._num_tokens - first_block * block_size, num_blocks * block_size)
        with on_handoff_stream(self._pool.raw.device):
            return pack(self._pool, ids, num_tokens, dtype, slot_tensor(payload), digest=digest)

    def granted(self) -> None: ...

    def closed(self, outcome: Outcome, reason: str) -> None:
        self.closed_as.set_result((outcome, reason))


class PoolSink:
    """Room for them in another pool, as a decode worker has it."""

    def __init__(self, pool: KvPool, ids: Sequence[int]) -> None:
        self._pool, self._ids = pool, ids
        self.ready_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def reserve(self) -> int | Room:
        return 0

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        with on_handoff_stream(self._pool.raw.device):
            return unpack(self._pool, self._ids[first_block : first_block + num_blocks], slot_tensor(blocks), digest=True)

    def publish(self, first_block: int, num_blocks: int) -> None: ...

    def revoked(self) -> None: ...

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        self.ready_at.set_result(time.perf_counter())

    def closed(self, reason: str, is_retryable: bool) -> None:
        self.ready_at.set_exception(RuntimeError(f"the hand-off failed: {reason}"))


class Node:
    """One end. `run` numbers shipments; both ends are told the same."""

    def __init__(self, role: str, setup: Setup) -> None:
        if setup.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("PyTorch sees no CUDA device")
        flags = ["--model=builtin", f"--role={role}", f"--device={setup.device}", f"--slot-size={setup.slot_size}"]
        settings = parse_settings(WorkerSettings, flags, prog="handoff")
        widest = slot_bytes_for(replace(setup.layout, dtype="fp32").block_bytes)
        options = AgentOptions(settings.send_slots, settings.receive_slots, max(settings.slot_size, widest))
        self.agent = TransferAgent(open_transport(settings), secrets.token_bytes(16), FINGERPRINT, options)
        self.agent.start()
        self.setup = setup
        # A pool has room for twice as much, and blocks lie anywhere in it.
        self.ids = random.Random(SEEDS[role]).sample(range(2 * setup.num_blocks), setup.num_blocks)
        self._role = role
        self._device = torch.device(setup.device)
        self._pools: dict[str, KvPool] = {}
        self._sinks: dict[int, PoolSink] = {}
        self._peer: PeerAddress | None = None

    def card(self) -> PeerAddress:
        return PeerAddress(self._role, self.agent.incarnation, self.agent.transport.address)

    def meet(self, peer: PeerAddress) -> None:
        self._peer = peer
        self.agent.meet(peer)

    async def measure(self) -> PairRates:
        """As workers measure each other when they meet."""
        assert self._peer is not None
        rates: asyncio.Future[PairRates] = asyncio.get_running_loop().create_future()
        self.agent.measure(self._peer, rates.set_result)
        return await rates

    # -- one hand-off

    def fill(self, seed: int) -> None:
        """Other numbers at the sender than ever before."""
        generator = torch.Generator(self._device).manual_seed(seed)
        self.pool(self.setup.layout.dtype).elements.normal_(generator=generator)
        self._settle()

    def expect(self, run: int, dtype: str) -> None:
        """Nothing of an earlier hand-off is left."""
        assert self._peer is not None
        setup, pool = self.setup, self.pool(dtype)
        pool.raw.fill_(POISON)
        self._settle()
        sink = self._sinks[run] = PoolSink(pool, self.ids)
        expectation = Expectation(
            run.to_bytes(16, "little"), TOKEN, self._peer.incarnation, setup.num_tokens, pool.layout, self.agent.fingerprint
        )
        self.agent.expect(expectation, self._peer, sink)

    async def ready_at(self, run: int) -> float:
        """The instant when every block was verified and in its place."""
        return await self._sinks.pop(run).ready_at

    async def ship(self, run: int) -> float:
        """Sends all of it; the instant of the first pack."""
        assert self._peer is not None
        setup = self.setup
        source = PoolSource(self.pool(setup.layout.dtype), self.ids, setup.num_tokens)
        shipment = Shipment(run.to_bytes(16, "little"), TOKEN, setup.num_tokens, setup.layout)
        sender = self.agent.offer(shipment, self._peer, source)
        for num_computed in range(setup.chunk_tokens, setup.num_tokens, setup.chunk_tokens):
            sender.computed(num_computed)
        sender.computed(setup.num_tokens)
        sender.finish([kv_pb2.FirstToken(token_id=1)])
        outcome, reason = await source.closed_as
        if outcome is not Outcome.RECEIVED or source.began is None:
            raise RuntimeError(f"the hand-off failed: {outcome.value} {reason}")
        return source.began

    # -- what came of it, and what it is held against

    def expected(self, dtype: str, blocks: Sequence[int]) -> list[int]:
        """Sums of blocks (in order) as they have to arrive, by plain torch on the CPU."""
        pool = self.pool(self.setup.layout.dtype)
        layout, num_tokens = pool.layout, self.setup.num_tokens
        copied = KvPool(layout, len(blocks), CPU, raw=pool.raw[[self.ids[b] for b in blocks]].cpu())
        payload = torch.empty(len(blocks) * replace(layout, dtype=dtype).block_bytes, dtype=torch.uint8)
        num_valid = sum(min(layout.block_size, num_tokens - b * layout.block_size) for b in blocks)
        return pack_reference(copied, range(len(blocks)), num_valid, dtype, payload)

    def found(self, dtype: str, blocks: Sequence[int]) -> list[int]:
        """Sums of the same blocks as they lie in the pool here."""
        return block_sums(self.pool(dtype).raw[[self.ids[b] for b in blocks]].cpu().view(-1), len(blocks))

    def num_touched(self, dtype: str) -> int:
        """Blocks with no part in it that something was written to."""
        raw = self.pool(dtype).raw
        others = sorted(set(range(len(raw))) - set(self.ids))
        return int((raw[others] != POISON).any(1).sum())

    def memcpy(self, num_bytes: int) -> float:
        """Seconds of one copy from device memory to device memory, of which no cache holds much."""
        source, target = torch.ones(2, num_bytes, dtype=torch.uint8, device=self._device)
        self._settle()
        began = time.perf_counter()
        target.copy_(source)
        self._settle()
        return time.perf_counter() - began

    def pool(self, dtype: str) -> KvPool:
        if dtype not in self._pools:
            self._pools[dtype] = KvPool(replace(self.setup.layout, dtype=dtype), 2 * self.setup.num_blocks, self._device)
        return self._pools[dtype]

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """The first message is role and setup; every other one an order. Each is answered: what it returns, and what went wrong."""
    end_with_parent()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        uvloop.run(_obey(connection))
    os._exit(0)  # endpoints of UCX may block in their destructors


async def _obey(connection: Connection) -> None:
    try:
        node = Node(*connection.recv())
    except Exception as exc:
        connection.send((None, f"{type(exc).__name__}: {exc}"))
        return
    connection.send((None, ""))
    await obey(connection, node)


if __name__ == "__main__":
    main()
