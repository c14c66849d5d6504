"""The whole path: two real agents, a source and a sink over real pools. The only file here that knows the agent's interface."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

import torch

from benchmarks.transfer import ops
from benchmarks.transfer.cases import Path
from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.expectation import Expectation, Room
from kvtransfer.frames import DIGEST_OFF, DIGEST_SUM64
from kvtransfer.peers import PeerAddress
from kvtransfer.probe import PairMeter
from kvtransfer.sender import Outcome, Shipment
from kvtransfer.ucx import UcxTransport
from splitfire.core.layout import KvLayout
from splitfire.engine.pool import KvPool
from splitfire.v1 import kv_pb2

FINGERPRINT = b"F" * 32
TOKEN = b"t" * 16


class PoolSource:
    """The blocks `ids` of a pool."""

    def __init__(self, pool: KvPool, ids: list[int], path: Path) -> None:
        self._pool, self._ids, self._path = pool, ids, path
        self.closed_as: asyncio.Future[tuple[Outcome, str]] = asyncio.get_running_loop().create_future()

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        ids = self._ids[first_block : first_block + num_blocks]
        return ops.pack(self._path.ops, self._pool, ids, dtype, torch.frombuffer(payload, dtype=torch.uint8), digest=digest)

    def granted(self) -> None: ...

    def closed(self, outcome: Outcome, reason: str) -> None:
        self.closed_as.set_result((outcome, reason))


class PoolSink:
    """Room for them in another pool."""

    def __init__(self, pool: KvPool, ids: list[int], path: Path) -> None:
        self._pool, self._ids, self._path = pool, ids, path
        self.ready_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def reserve(self) -> int | Room:
        return 0

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        ids = self._ids[first_block : first_block + num_blocks]
        payload = torch.frombuffer(blocks, dtype=torch.uint8)
        return ops.unpack(self._path.ops, self._pool, ids, payload, digest=self._path.digest)

    def publish(self, first_block: int, num_blocks: int) -> None: ...

    def revoked(self) -> None: ...

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        self.ready_at.set_result(time.perf_counter())

    def closed(self, reason: str, is_retryable: bool) -> None:
        self.ready_at.set_exception(RuntimeError(reason))


class _Pinger(PairMeter):
    """In the place of the pair's meter: one ping at a time, each timed."""

    def __init__(self, agent: TransferAgent, send: object) -> None:
        super().__init__(agent, send, lambda _lent: None, lambda *_: None)  # type: ignore[arg-type]
        self.answered = asyncio.Event()

    def on_pong(self, pong: kv_pb2.Pong) -> None:
        self.answered_at = time.perf_counter()
        self.answered.set()


class PathEnd:
    """One worker's agent."""

    def __init__(self, role: str, options: AgentOptions) -> None:
        self.agent = TransferAgent(UcxTransport("lo"), secrets.token_bytes(16), FINGERPRINT, options)
        self.agent.start()
        self.address = PeerAddress(role, self.agent.incarnation, self.agent.transport.address)
        self._peer: PeerAddress | None = None

    def meet(self, peer: PeerAddress) -> None:
        self._peer = peer
        self.agent.meet(peer)

    def expect(self, run: int, sink: PoolSink, layout: KvLayout, num_tokens: int, *, digest: bool) -> None:
        assert self._peer is not None
        expectation = Expectation(
            run.to_bytes(16, "little"), TOKEN, self._peer.incarnation, num_tokens, layout, self.agent.fingerprint,
            digest_algorithm=DIGEST_SUM64 if digest else DIGEST_OFF,
        )  # fmt: skip
        self.agent.expect(expectation, self._peer, sink)

    async def ship(self, run: int, source: PoolSource, layout: KvLayout, num_tokens: int) -> float:
        """Offers and sends all of it; returns the instant before the offer."""
        assert self._peer is not None
        began = time.perf_counter()
        sender = self.agent.offer(Shipment(run.to_bytes(16, "little"), TOKEN, num_tokens, layout), self._peer, source)
        sender.computed(num_tokens)
        sender.finish([kv_pb2.FirstToken(token_id=1)])
        outcome, reason = await source.closed_as
        assert outcome is Outcome.RECEIVED, (outcome, reason)
        return began

    async def ping(self, count: int) -> list[float]:
        """Round trips of control frames, in seconds."""
        assert self._peer is not None
        peer = self.agent._peers.get(self._peer)
        pinger, before = _Pinger(self.agent, peer.send), peer.meter
        peer.meter, seconds = pinger, []
        for number in range(count):
            pinger.answered.clear()
            began = time.perf_counter()
            peer.send(kv_pb2.KvMessage(ping=kv_pb2.Ping(sequence=number)))
            await pinger.answered.wait()
            seconds.append(pinger.answered_at - began)
        peer.meter = before
        return seconds
