"""What a worker tells its routers about itself: load every second, sooner when something ended; measured pairs. io thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from kvtransfer.agent import TransferAgent
from splitfire.core import limits
from splitfire.engine.engine import Engine
from splitfire.v1 import fleet_pb2
from splitfire.worker.pairs import MeasuredPair

SETTLE_S = 0.05  # what ends together is reported together


@dataclass(slots=True)
class _Feed:
    """What one Report stream still has to say."""

    pairs: dict[bytes, MeasuredPair]  # the last of each peer, so that a router that does not read costs nothing
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class LoadReporter:
    """One feed for each router that is attached."""

    def __init__(self, engine: Engine, agent: TransferAgent, is_draining: Callable[[], bool]) -> None:
        self._engine = engine
        self._agent = agent
        self._is_draining = is_draining
        self._feeds: list[_Feed] = []
        self._pairs: dict[bytes, MeasuredPair] = {}

    async def reports(self) -> AsyncIterator[fleet_pb2.ReportRequest]:
        """One router's stream, from the pairs known now on; never ends by itself."""
        feed = _Feed(dict(self._pairs))
        self._feeds.append(feed)
        try:
            while True:
                feed.wake.clear()
                pairs, feed.pairs = feed.pairs, {}
                for pair in pairs.values():
                    wire = pair.to_wire(time.monotonic())
                    yield fleet_pb2.ReportRequest(incarnation=self._agent.incarnation, pair=wire)
                yield fleet_pb2.ReportRequest(incarnation=self._agent.incarnation, load=self._load())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limits.REPORT_EVERY_S):
                        await feed.wake.wait()
                        await asyncio.sleep(SETTLE_S)
        finally:
            self._feeds.remove(feed)

    def report_now(self) -> None:
        for feed in self._feeds:
            feed.wake.set()

    @property
    def pairs(self) -> list[MeasuredPair]:
        """The last measurement of each."""
        return list(self._pairs.values())

    def add_pair(self, pair: MeasuredPair) -> None:
        self._pairs[pair.peer.incarnation] = pair
        for feed in self._feeds:
            feed.pairs[pair.peer.incarnation] = pair
        self.report_now()

    def repeat_pair(self, incarnation: bytes) -> None:
        """A router may have come to know the peer after it was told of the pair, and then forgot what it was told."""
        pair = self._pairs.get(incarnation)
        if pair is not None:
            self.add_pair(pair)

    def forget(self, incarnation: bytes) -> None:
        """The peer is gone, so its pair says nothing any more."""
        self._pairs.pop(incarnation, None)

    def _load(self) -> fleet_pb2.Load:
        load = self._engine.load()
        return fleet_pb2.Load(
            total_blocks=load.total_blocks,
            free_blocks=load.available_blocks,
            running_sequences=load.running,
            waiting_sequences=load.waiting,
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
            resident_bytes=resident_bytes(),
            held_slots=self._agent.num_held_slots,
            is_draining=self._is_draining(),
        )


def host_id() -> str:
    """Equal on two processes that can share memory: one boot of one kernel, one /dev/shm."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}-{os.stat('/dev/shm').st_dev}"  # noqa: S108
    except OSError:
        return socket.gethostname()


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
