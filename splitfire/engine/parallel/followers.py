"""The other ranks of a worker as rank 0 has them: processes on this host, each with a channel. Nothing of them has a name or a port that
others could find.

 1. `Followers` starts them. Each gets the plan, loads the model, cuts its shard, and says that it has.
 2. `join` waits for that, tells them to go on, and all meet as one group.
 3. `send` gives each a step. They compute it beside rank 0, answer through the group's sums alone, and wait for the next.
 4. `close` ends them, and so does rank 0's end, however it comes: by their channels, and by the signal of a parent's death.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from splitfire.core.flags import PARENT_VARIABLE
from splitfire.engine.parallel.channel import Channel
from splitfire.engine.parallel.group import Group, join
from splitfire.engine.parallel.plan import RankPlan
from splitfire.engine.parallel.pools import ShardedPool, map_pool, new_memory, open_cuda_pool
from splitfire.engine.pool import KvPool

LOAD_S = 1800.0  # a large checkpoint takes its time
STEP_S = 30.0  # that one rank waits for another within a step
END_S = 5.0
POLL_S = 0.01
NOTHING = -1  # a descriptor that is not there


class RankLost(RuntimeError):
    """Another rank ended, or did not answer in time: what this worker computes with is not whole any more."""


class Followers:
    """Ranks 1 .. size - 1 of a plan. They end with this object's process."""

    def __init__(self, plan: RankPlan) -> None:
        self._plan = plan
        self._meeting_file = os.memfd_create("splitfire-ranks")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._memories: list[int] = []  # of their pools, on CPUs
        for rank in range(1, plan.size):
            self._start(rank)

    def join(self) -> tuple[Group, ShardedPool]:
        """Waits until every follower has its shard; rank 0 must have its own. RankLost when one of them ends before."""
        plan = self._plan
        others: list[KvPool] = []
        for rank, channel in enumerate(self._channels, 1):
            try:
                handle = channel.receive(LOAD_S)
            except TimeoutError as exc:
                raise RankLost(f"rank {rank} has not loaded its shard within {LOAD_S:g} s") from exc
            if handle is None:
                raise RankLost(self.lost(END_S) or f"rank {rank} ended while it loaded its shard")
            if handle:
                others.append(open_cuda_pool(handle, plan.rank_layout, plan.num_blocks))
        others += [map_pool(memory, plan.rank_layout, plan.num_blocks) for memory in self._memories]
        self.send(b"")
        group = join(0, plan.size, plan.device_of(0), self._meeting_file, STEP_S)
        own = KvPool(plan.rank_layout, plan.num_blocks, plan.device_of(0))
        return group, ShardedPool(plan.layout, own, others)

    def send(self, message: bytes) -> None:
        """The same to each. RankLost when one does not take it."""
        for rank, channel in enumerate(self._channels, 1):
            try:
                channel.send(message, STEP_S)
            except OSError as exc:
                raise RankLost(self.lost(END_S) or f"rank {rank} does not listen: {exc}") from exc

    def lost(self, wait_s: float = 0.0) -> str:
        """What happened to one that has ended; empty: none has, within the time. Any thread."""
        deadline = time.monotonic() + wait_s
        while True:
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None:
                    return f"rank {rank} ended with code {process.returncode}"
            if time.monotonic() >= deadline:
                return ""
            time.sleep(POLL_S)

    def close(self) -> None:
        """All of them have ended when this returns. They have nothing to finish."""
        for process in self._processes:
            process.kill()
            process.wait()
        for channel in self._channels:
            channel.close()
        for descriptor in (self._meeting_file, *self._memories):
            os.close(descriptor)
        self._processes, self._channels, self._memories = [], [], []

    def _start(self, rank: int) -> None:
        plan = self._plan
        memory = NOTHING
        if plan.device == "cpu":
            memory = new_memory(plan.num_blocks * plan.rank_layout.block_bytes)
            self._memories.append(memory)
        mine, theirs = socket.socketpair()
        self._channels.append(Channel(mine))
        descriptors = (theirs.fileno(), self._meeting_file, memory)
        with theirs:
            # A session of its own: Ctrl-C reaches rank 0 alone, which finishes what it has.
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "splitfire.engine.parallel.follower", *map(str, (rank, *descriptors))],
                stdin=subprocess.DEVNULL,
                pass_fds=[d for d in descriptors if d != NOTHING],
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )
        self._processes.append(process)
        self._channels[-1].send(plan.to_json(), STEP_S)
