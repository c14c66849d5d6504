"""Thousands of transfers between two agents with small rings, three in ten of them aborted, to see what stays behind.

`python -m tests.kvtransfer.leaks 10000` prints what `make leak-check` is after: slots, blocks, machines and memory, after
the first fifth and at the end.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import psutil

from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.expectation import Expectation
from kvtransfer.frames import slot_bytes_for
from kvtransfer.memory import Hub
from kvtransfer.peers import PeerAddress
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Outcome, Sender, Shipment
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from splitfire.v1 import kv_pb2
from tests.kvtransfer.fakes import FINGERPRINT, LAYOUT, FakeSink, FakeSource
from tests.kvtransfer.nodes import until

ABORTED_SHARE = 0.4  # some fall after the end: three in ten are aborted
AT_ONCE = 8
MAX_BLOCKS = 24
LATE_TURNS = 4  # of the event loop after the last block was computed, in which an abort may still fall
FIRST = kv_pb2.FirstToken(token_id=42)


@dataclass
class Held:
    """What is there at one moment, nothing being under way."""

    slots: int
    retired: int
    open: int
    machines: int  # senders and receivers that something still refers to
    resident_bytes: int


@dataclass
class Churn:
    """Two agents, and a count of how their transfers ended."""

    prefill: TransferAgent
    decode: TransferAgent
    random: Random
    ends: Counter[str] = field(default_factory=Counter)
    num_blocks_moved: int = 0
    num_blocks_held: int = 0  # by sinks whose transfer is over

    @classmethod
    def over(cls, transports: tuple[Transport, Transport], seed: int) -> Churn:
        options = AgentOptions(send_slots=2, receive_slots=4, slot_bytes=slot_bytes_for(LAYOUT.block_bytes) * 3)
        agents = [TransferAgent(t, secrets.token_bytes(16), FINGERPRINT, options) for t in transports]
        for agent in agents:
            agent.start()
        return cls(agents[0], agents[1], Random(seed))

    async def transfers(self, count: int) -> None:
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await self._transfer()

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def _transfer(self) -> None:
        """One, checked to the last byte if it arrives; with some luck one end aborts it at some moment."""
        draw = self.random
        seed, num_blocks = draw.randrange(1 << 30), draw.randint(1, MAX_BLOCKS)
        num_tokens = num_blocks * LAYOUT.block_size - draw.randrange(LAYOUT.block_size)
        transfer_id, token = draw.randbytes(16), draw.randbytes(16)
        source, sink = FakeSource(seed), FakeSink(seed, first_block=draw.randrange(num_blocks))
        expectation = Expectation(transfer_id, token, self.prefill.incarnation, num_tokens, LAYOUT, FINGERPRINT[:8])
        receiver = self.decode.expect(expectation, address_of(self.prefill), sink)
        sender = self.prefill.offer(Shipment(transfer_id, token, num_tokens, LAYOUT), address_of(self.decode), source)
        is_aborted = draw.random() < ABORTED_SHARE
        aborting = asyncio.create_task(self._abort(sender, receiver, num_blocks)) if is_aborted else None
        for computed in range(0, num_tokens, LAYOUT.block_size):
            sender.computed(computed)
            await asyncio.sleep(0)
        sender.computed(num_tokens)
        sender.finish([FIRST])
        await until(lambda: source.outcome is not None and bool(sink.end), 30)
        if aborting is not None:
            await aborting
        if source.outcome is Outcome.RECEIVED:
            sink.assert_right(num_blocks)
            self.num_blocks_moved += num_blocks - sink.first_block
        else:
            assert is_aborted, f"nobody asked for it: {source.outcome}, {source.reason}, {sink.end}"
            self.num_blocks_held += sink.holds_blocks and sink.end != "ready"
        self.ends["received" if source.outcome is Outcome.RECEIVED else "aborted"] += 1

    async def _abort(self, sender: Sender, receiver: Receiver, num_blocks: int) -> None:
        by_sender, turns = self.random.random() < 0.5, self.random.randrange(num_blocks + LATE_TURNS)
        for _ in range(turns):
            await asyncio.sleep(0)
        if by_sender:
            sender.abort("test")
        else:
            receiver.close("test", is_retryable=True)

    async def held(self) -> Held:
        """When nothing moves any more."""
        agents = (self.prefill, self.decode)
        await until(lambda: not any(a.num_held_slots or a.num_open for a in agents), 30)
        await asyncio.sleep(0)
        gc.collect()
        return Held(
            slots=sum(a.num_held_slots for a in agents),
            retired=sum(ring.num_retired for a in agents for ring in (a.send_ring, a.receive_ring)),
            open=sum(a.num_open for a in agents),
            machines=sum(type(o) in (Sender, Receiver) for o in gc.get_objects()),
            resident_bytes=psutil.Process().memory_info().rss,
        )

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


def address_of(agent: TransferAgent) -> PeerAddress:
    return PeerAddress("worker", agent.incarnation, agent.transport.address)


def memory() -> tuple[Transport, Transport]:
    hub = Hub()
    return hub.create(), hub.create()


def tcp() -> tuple[Transport, Transport]:
    return TcpTransport(), TcpTransport()


def ucx() -> tuple[Transport, Transport]:
    from kvtransfer.ucx import UcxTransport

    return UcxTransport("lo"), UcxTransport("lo")


async def run(make: Callable[[], tuple[Transport, Transport]], count: int, seed: int) -> tuple[Churn, Held, Held]:
    """What is held after a fifth of `count` transfers, and after all."""
    churn = Churn.over(make(), seed)
    await churn.transfers(count // 5)
    warm = await churn.held()
    await churn.transfers(count - count // 5)
    end = await churn.held()
    churn.close()
    return churn, warm, end


def assert_nothing_stayed(churn: Churn, warm: Held, end: Held, max_growth_bytes: int) -> None:
    for held in (warm, end):
        assert (held.slots, held.retired, held.open, held.machines) == (0, 0, 0, 0), held
    assert churn.num_blocks_held == 0
    assert end.resident_bytes - warm.resident_bytes < max_growth_bytes, (warm, end)


def main() -> None:
    count = int(sys.argv[1])
    for make in (memory, tcp, ucx):
        seed = int.from_bytes(os.urandom(4))
        began = time.monotonic()
        churn, warm, end = asyncio.run(run(make, count, seed))
        sys.stdout.write(
            f"{make.__name__}: {count} transfers, {churn.num_blocks_moved} blocks in {time.monotonic() - began:.1f} s, "
            f"{dict(churn.ends)}; resident {warm.resident_bytes / 2**20:.1f} MiB after {count // 5}, "
            f"{end.resident_bytes / 2**20:.1f} MiB at the end; {end} (seed {seed})\n"
        )
        assert_nothing_stayed(churn, warm, end, 4 << 20)


if __name__ == "__main__":
    main()
