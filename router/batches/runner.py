"""Which batches this process runs: those whose lock it gets. Event loop only.

Every process with the same directory looks now and then what is open there. A lock (flock) goes with the process that holds it, however
that ends, and the next who looks goes on. Whoever wants a batch cancelled leaves a mark beside it, which its owner sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial

import structlog

from router.access import Access
from router.batches.disk import Disk
from router.batches.records import StoredBatch
from router.batches.run import BatchRun, End
from router.batches.store import FileStore
from router.completions import Completions
from splitfire.core import limits
from splitfire.core.errors import SplitfireError

log = structlog.get_logger("router")
LOOK_S = 1.0
SWEEP_S = 600.0
STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class Running:
    """One of this process's."""

    run: BatchRun
    task: asyncio.Task[None]


class BatchRunner:
    """`start`, then `stop`. At most `num_requests` are in flight, of all batches of this process together."""

    def __init__(self, store: FileStore, disk: Disk, completions: Completions, access: Access, num_requests: int) -> None:
        self._store = store
        self._disk = disk
        self._completions = completions
        self._access = access
        self._num_requests = num_requests
        self._permits = asyncio.Semaphore(num_requests)
        self._running: dict[str, Running] = {}
        self._kicked = asyncio.Event()
        self._is_draining = False
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.create_task(self._look_on(), name="batches")

    def drain(self) -> None:
        """What is in flight is finished, nothing more is begun."""
        self._is_draining = True
        for running in self._running.values():
            running.run.drain()

    async def stop(self) -> None:
        """What is open is left for the next who looks."""
        self._is_draining = True
        tasks = [running.task for running in self._running.values()]
        for running in self._running.values():
            running.run.end(End.STOPPED)
        if self._looking is not None:
            self._looking.cancel()
            tasks.append(self._looking)
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)

    def kick(self) -> None:
        """There is something to see."""
        self._kicked.set()

    def live(self, batch: StoredBatch) -> StoredBatch:
        """As it is now, where this process knows more than the disk."""
        running = self._running.get(batch.id)
        return running.run.batch if running is not None else batch

    async def _look_on(self) -> None:
        loop = asyncio.get_running_loop()
        swept_at = -SWEEP_S
        while True:
            with contextlib.suppress(SplitfireError):  # the disk may be well again later
                await self._look()
                if loop.time() - swept_at > SWEEP_S:
                    swept_at = loop.time()
                    await self._disk(self._store.sweep)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._kicked.wait()
            self._kicked.clear()

    async def _look(self) -> None:
        found = await self._disk(self._store.all_open)
        for batch in found:
            running = self._running.get(batch.id)
            if running is not None and await self._disk(self._store.is_cancelled, batch):
                running.run.end(End.CANCELLED)
        waiting = [batch for batch in found if batch.id not in self._running]
        while waiting and len(self._running) < limits.MAX_RUNNING_BATCHES and not self._is_draining:
            counts = Counter(running.run.batch.tenant for running in self._running.values())
            following = min(waiting, key=lambda batch: (counts[batch.tenant], batch.id))
            waiting.remove(following)
            lock = await self._disk(self._store.lock, following)
            if lock is not None:
                await self._begin(following, lock)

    async def _begin(self, found: StoredBatch, lock: int) -> None:
        try:
            batch = await self._disk(self._store.batch, found.tenant, found.id)  # whoever had it before may have ended it
            is_cancelled = await self._disk(self._store.is_cancelled, found)
        except BaseException:
            os.close(lock)  # or nobody could run it any more
            raise
        if batch is None or batch.is_over or self._is_draining:
            os.close(lock)
            return
        run = BatchRun(
            batch,
            self._store,
            self._disk,
            self._completions,
            partial(self._access.named, batch.tenant),
            self._permits,
            self._num_requests,
        )
        if is_cancelled:
            run.end(End.CANCELLED)
        task = asyncio.create_task(self._run(run, lock), name=f"batch-{batch.id}")
        self._running[batch.id] = Running(run, task)

    async def _run(self, run: BatchRun, lock: int) -> None:
        batch_id = run.batch.id
        log.info("batch begins", batch_id=batch_id, status=run.batch.status)
        try:
            await run.run()
        except SplitfireError as exc:  # not even its files could be closed
            log.error("batch left", batch_id=batch_id, reason=exc.reason)
        finally:
            del self._running[batch_id]
            os.close(lock)
            counts = {"completed": run.batch.completed, "failed": run.batch.failed, "total": run.batch.total}
            log.info("batch ends", batch_id=batch_id, status=run.batch.status, **counts)
            self.kick()
