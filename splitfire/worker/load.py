"""What a worker tells its routers about itself: load every second, sooner when something ended; measured pairs; its prefix cache.

io thread. Each router has a stream of its own, and is told of the others' share of the load: of its own it knows more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from kvtransfer.agent import TransferAgent
from splitfire.core import limits
from splitfire.engine.engine import Engine
from splitfire.engine.sequence import SeqId
from splitfire.v1 import fleet_pb2
from splitfire.worker.cache_feed import CacheFeeds
from splitfire.worker.job import Job, Replies
from splitfire.worker.pairs import MeasuredPair

SETTLE_S = 0.05  # what ends together is reported together; and what comes into the cache and leaves it


class ReportStream:
    """What one router's Report stream still has to say. Iterated by its link, once."""

    def __init__(self, reporter: LoadReporter, replies: Replies) -> None:
        self._reporter = reporter
        self._replies = replies
        self._cache = reporter.caches.open()
        self._wake = asyncio.Event()
        self._load_at = 0.0  # when it is due
        self.pairs = reporter.known_pairs()  # the last of each peer, so that a router that does not read costs nothing

    def wake(self, *, with_load: bool = True) -> None:
        if with_load:
            self._load_at = 0.0
        self._wake.set()

    def resync(self) -> None:
        """The router lost count of what the prefix cache holds."""
        self._cache.resync()
        self._wake.set()

    def close(self) -> None:
        self._reporter.caches.close(self._cache)

    async def messages(self) -> AsyncIterator[fleet_pb2.ReportRequest]:
        """From the pairs known now on; never ends by itself."""
        incarnation = self._reporter.incarnation
        while True:
            self._wake.clear()
            pairs, self.pairs = self.pairs, {}
            for pair in pairs.values():
                yield fleet_pb2.ReportRequest(incarnation=incarnation, pair=pair.to_wire(time.monotonic()))
            if (now := time.monotonic()) >= self._load_at:
                self._load_at = now + limits.REPORT_EVERY_S
                yield fleet_pb2.ReportRequest(incarnation=incarnation, load=self._reporter.load(self._replies))
            for events in self._cache.messages(now):
                yield fleet_pb2.ReportRequest(incarnation=incarnation, cache_events=events)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self._load_at - time.monotonic(), 0.0)):
                    await self._wake.wait()
                    await asyncio.sleep(SETTLE_S)


@dataclass(slots=True)
class _OpenJob:
    job: Job
    ids: tuple[SeqId, ...]  # as the services know it
    has_begun: bool = False  # the engine has computed some of its prompt


class OpenJobs:
    """Whose the work is that this worker has: for as long as a service owns it."""

    def __init__(self, owns: Callable[[SeqId], bool], num_missing: Callable[[list[SeqId]], int]) -> None:
        self._owns = owns
        self._num_missing = num_missing
        self._jobs: dict[SeqId, _OpenJob] = {}  # those that ended are in it until the next report, a second at most

    def add(self, job: Job) -> None:
        members = (job,) if job.part == fleet_pb2.PART_PREFILL else job.members()
        self._jobs[job.spec.seq_id] = _OpenJob(job, tuple(member.spec.seq_id for member in members))

    def begun(self, ids: tuple[SeqId, ...]) -> None:
        for seq_id in ids:
            if seq_id in self._jobs:
                self._jobs[seq_id].has_begun = True

    def of_others(self, replies: Replies) -> tuple[int, int]:
        """Sequences that other routers have here, and tokens of their prompts that are to be computed."""
        self._jobs = {i: job for i, job in self._jobs.items() if any(map(self._owns, job.ids))}
        others = [job for job in self._jobs.values() if job.job.replies is not replies]
        num_sequences = sum(self._owns(seq_id) for job in others for seq_id in job.ids)
        computing = [job for job in others if job.job.part != fleet_pb2.PART_DECODE]
        num_waiting = sum(job.job.spec.num_tokens for job in computing if not job.has_begun)
        return num_sequences, num_waiting + self._num_missing([job.job.spec.seq_id for job in computing if job.has_begun])


class LoadReporter:
    """One stream for each router that is attached."""

    def __init__(self, engine: Engine, agent: TransferAgent, jobs: OpenJobs, is_draining: Callable[[], bool]) -> None:
        self.caches = CacheFeeds(engine)
        self._engine = engine
        self._agent = agent
        self._jobs = jobs
        self._is_draining = is_draining
        self._streams: list[ReportStream] = []
        self._pairs: dict[bytes, MeasuredPair] = {}

    @property
    def incarnation(self) -> bytes:
        return self._agent.incarnation

    @contextlib.contextmanager
    def stream(self, replies: Replies) -> Iterator[ReportStream]:
        """For the router behind `replies`."""
        stream = ReportStream(self, replies)
        self._streams.append(stream)
        try:
            yield stream
        finally:
            self._streams.remove(stream)
            stream.close()

    def known_pairs(self) -> dict[bytes, MeasuredPair]:
        return dict(self._pairs)

    def cache_may_have_changed(self) -> None:
        """A step is over."""
        if self._engine.blocks.has_changes:
            for stream in self._streams:
                stream.wake(with_load=False)

    def report_now(self) -> None:
        for stream in self._streams:
            stream.wake()

    @property
    def pairs(self) -> list[MeasuredPair]:
        """The last measurement of each."""
        return list(self._pairs.values())

    def add_pair(self, pair: MeasuredPair) -> None:
        self._pairs[pair.peer.incarnation] = pair
        for stream in self._streams:
            stream.pairs[pair.peer.incarnation] = pair
        self.report_now()

    def repeat_pair(self, incarnation: bytes) -> None:
        """A router may have come to know the peer after it was told of the pair, and then forgot what it was told."""
        pair = self._pairs.get(incarnation)
        if pair is not None:
            self.add_pair(pair)

    def forget(self, incarnation: bytes) -> None:
        """The peer is gone, so its pair says nothing any more."""
        self._pairs.pop(incarnation, None)

    def load(self, replies: Replies) -> fleet_pb2.Load:
        """As it is now, for the router behind `replies`."""
        load = self._engine.load()
        other_sequences, other_queued_tokens = self._jobs.of_others(replies)
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
            step_s=load.step_s,
            other_sequences=other_sequences,
            other_queued_tokens=other_queued_tokens,
            num_routers=len(self._streams),
            cached_blocks=load.cached_blocks,
            reserved_blocks=load.reserved_blocks,
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
