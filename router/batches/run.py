"""One batch, by the one process that holds its lock. Event loop only; what waits for the disk is done there.

1. Validate: every line is a request with a custom_id of its own, or the batch fails and says which lines are none.
2. Answer: `permits` are shared by all batches of the process, and every request is of the class batch: whoever waits for an answer comes
   first. What has no room now is asked again. Each answer is a row, written once.
3. Files: what there is becomes two files, whether all was answered, the time is over, or somebody cancelled.

A process that ends in between leaves a batch that another goes on with: rows that are there are not made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from enum import Enum, auto
from typing import Any

import structlog

from router.batches.disk import Disk
from router.batches.records import Event, LineError, Status, StoredBatch, StoredFile
from router.batches.rows import Lines, Next, Rows, Validation
from router.batches.store import ERRORS, OUTPUT, FileStore
from router.completions import Completions, Whole
from router.inference import Call
from router.openai.errors import http_error
from router.status import log_internal, unexpected
from router.tenants import Tenant
from splitfire.core.batch_lines import BatchRequest, answer_row, error_row
from splitfire.core.errors import DataLoss, NotFound, SplitfireError

log = structlog.get_logger("router")
TIER = "flex"
SAVE_S = 2.0  # counts are saved as often, if they changed
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
MAX_LOST = 3  # times that one request's KV may be lost
EXPIRED = "batch_expired"


class End(Enum):
    """Why a batch's work stops before it is done."""

    CANCELLED = auto()
    EXPIRED = auto()
    STOPPED = auto()  # the process ends; another goes on


class BatchRun:
    """`run` once; `batch` is how far it is."""

    def __init__(
        self,
        batch: StoredBatch,
        store: FileStore,
        disk: Disk,
        completions: Completions,
        tenant: Callable[[], Tenant | None],
        permits: asyncio.Semaphore,
        num_workers: int,
    ) -> None:
        self.batch = batch
        self._store = store
        self._disk = disk
        self._completions = completions
        self._tenant = tenant
        self._permits = permits
        self._num_workers = num_workers
        self._end: End | None = None
        self._is_draining = False
        self._working: asyncio.Task[None] | None = None
        self._input = -1
        self._rows: Rows | None = None

    def end(self, why: End) -> None:
        """What is in flight is cancelled."""
        if self._end is None and self.batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
            self._end = why
            if self._working is not None:
                self._working.cancel()

    def drain(self) -> None:
        """What is in flight is finished, nothing more is begun."""
        self._is_draining = True

    async def run(self) -> None:
        """Until it is over, or stopped."""
        expiry = asyncio.get_running_loop().call_later(self.batch.expires_at - time.time(), self.end, End.EXPIRED)
        try:
            await self._run()
        except SplitfireError as exc:
            await self._fail(LineError(code=exc.reason, message=str(exc)))
        except Exception as exc:
            error = unexpected(exc)
            log_internal(error, self.batch.id)
            await self._fail(LineError(code=error.reason, message=str(error)))
        finally:
            expiry.cancel()
            await self._disk(self._close)

    async def _run(self) -> None:
        batch = self.batch
        if batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
            with _named_file(batch.input_file_id):
                self._input = await self._disk(self._store.content, batch.tenant, batch.input_file_id)
            self._rows = await self._disk(Rows, self._store, self._store.directory(batch))
            self._count()
        if self.batch.status is Status.VALIDATING:
            await self._until_ended(self._validate())
        if self.batch.status is Status.IN_PROGRESS and self._end is None:
            await self._until_ended(self._answer_all())
            if self._end is None and not self._is_draining:
                await self._advance(Event.ALL_ANSWERED)
        if self.batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
            await self._end_early()
        if self.batch.status in (Status.FINALIZING, Status.CANCELLING):
            await self._make_files()
            await self._advance(Event.EXPIRE if self.batch.is_expired else Event.FILES_MADE)

    async def _end_early(self) -> None:
        if self._end is End.CANCELLED:
            await self._advance(Event.CANCEL)
        elif self._end is End.EXPIRED:
            if self.batch.status is Status.IN_PROGRESS:
                await self._give_up_rest()
            self.batch = self.batch.model_copy(update={"is_expired": True})
            await self._advance(Event.EXPIRE)

    async def _until_ended(self, work: Coroutine[Any, Any, None]) -> None:
        """The work, as far as it comes."""
        self._working = asyncio.create_task(work, name=f"batch-{self.batch.id}")
        if self._end is not None:
            self._working.cancel()
        try:
            await self._working
        except asyncio.CancelledError:
            if self._end is None or self._end is End.STOPPED:
                raise
        finally:
            self._working = None

    # -- 1

    async def _validate(self) -> None:
        check = Validation(self._input, self.batch.endpoint)
        try:
            began = time.monotonic()
            while not await self._disk(check.step):
                await asyncio.sleep(time.monotonic() - began)  # at most half of the time is taken from who waits for tokens
                began = time.monotonic()
        finally:
            await self._disk(check.close)
        if check.errors:
            await self._fail(*check.errors)
        else:
            self.batch = self.batch.model_copy(update={"total": check.num_lines})
            await self._advance(Event.VALID)

    # -- 2

    async def _answer_all(self) -> None:
        lines = Lines(self._input)
        turn = asyncio.Lock()
        try:
            async with asyncio.TaskGroup() as group:
                saving = group.create_task(self._save_counts(), name=f"batch-{self.batch.id}-save")
                workers = [
                    group.create_task(self._work(lines, turn), name=f"batch-{self.batch.id}-{index}")
                    for index in range(self._num_workers)
                ]
                await asyncio.wait(workers)
                saving.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            await self._disk(lines.close)

    async def _save_counts(self) -> None:
        saved = self.batch
        while True:
            await asyncio.sleep(SAVE_S)
            if self.batch is not saved:
                saved = self.batch
                await self._disk(self._store.save, saved)

    async def _work(self, lines: Lines, turn: asyncio.Lock) -> None:
        while not self._is_draining:
            await self._permits.acquire()
            try:
                async with turn:
                    following = await self._next(lines)
                if following is None or following.request is None:
                    return
                wait_s = await self._answer(following.request, 0)
            finally:
                self._permits.release()
            offset, num_tries = following.offset, 1
            del following  # what waits is kept as the place it stands at
            while wait_s is not None and not self._is_draining:
                await asyncio.sleep(wait_s)
                async with self._permits:
                    wait_s = await self._answer(await self._disk(lines.again, offset), num_tries)
                num_tries += 1

    async def _next(self, lines: Lines) -> Next | None:
        assert self._rows is not None
        while True:
            following = await self._disk(lines.take, self._rows)
            if following is None or following.request is not None or self._is_draining:
                return following

    async def _answer(self, request: BatchRequest, num_before: int) -> float | None:
        """None when there is a row; else seconds to wait before it is tried again."""
        assert self._rows is not None
        tenant = self._tenant()
        if tenant is None:
            raise NotFound("the tenant that made this batch is no longer known here", reason="tenant_gone")
        call = Call(tenant)
        try:
            asked = self._completions.read(request.url, {**request.body, "service_tier": TIER})
            whole = await asked.whole(call)
        except SplitfireError as exc:
            if exc.is_retryable and (num_before < MAX_LOST or not isinstance(exc, DataLoss)):
                backoff_s = min(MOST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(num_before, 10)) * random.uniform(0.5, 1.0)
                return max(backoff_s, exc.retry_after_s or 0.0)
            await self._add_error(request.custom_id, exc, call)
        except Exception as exc:
            await self._add_error(request.custom_id, unexpected(exc), call)
        else:
            await self._add_answer(request.custom_id, whole, call)
        return None

    async def _add_answer(self, custom_id: str, whole: Whole, call: Call) -> None:
        assert self._rows is not None
        usage, row = whole.usage, answer_row(custom_id, 200, call.request_id, whole.body)
        tokens = usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens
        await asyncio.shield(self._disk(self._rows.add_answer, custom_id, row, *tokens))  # it was generated: cancelled or not
        self._count()

    async def _add_error(self, custom_id: str, error: SplitfireError, call: Call) -> None:
        assert self._rows is not None
        made = http_error(error, call.request_id, {**call.partial, **log_internal(error, call.request_id)})
        row = answer_row(custom_id, made.status, call.request_id, made.body)
        await asyncio.shield(self._disk(self._rows.add_error, custom_id, row))
        self._count()

    async def _give_up_rest(self) -> None:
        """The time is over: a row for each request that has none."""
        assert self._rows is not None
        lines = Lines(self._input)
        try:
            while (following := await self._disk(lines.take, self._rows)) is not None:
                if following.request is not None:
                    custom_id = following.request.custom_id
                    row = error_row(custom_id, EXPIRED, "the request was not answered before the batch's time was over")
                    await self._disk(self._rows.add_error, custom_id, row)
        finally:
            await self._disk(lines.close)
        self._count()

    # -- 3

    async def _make_files(self) -> None:
        await self._disk(self._store.use_reserve, self.batch)
        if self._rows is not None:
            await self._disk(self._rows.close)
            self._count()
            self._rows = None
        self.batch = await self._disk(self._adopt)

    def _adopt(self) -> StoredBatch:
        batch, store, now = self.batch, self._store, int(time.time())
        directory, has = store.directory(batch), []
        expires_at = None if batch.output_expires_s is None else now + batch.output_expires_s
        for kind, file_id in ((OUTPUT, batch.output_file_id), (ERRORS, batch.error_file_id)):
            num_bytes = store.size(directory / kind)
            if num_bytes:
                name = f"{batch.id}_{kind}.jsonl"
                file = StoredFile(
                    id=file_id, num_bytes=num_bytes, created_at=now, filename=name, purpose="batch_output", expires_at=expires_at
                )
                store.adopt(batch.tenant, directory / kind, file)
            has.append(store.file(batch.tenant, file_id) is not None)
        return batch.model_copy(update={"has_output": has[0], "has_errors": has[1]})

    async def _fail(self, *errors: LineError) -> None:
        """The disk may be what failed: then it is tried until it can be written down."""
        self.batch = self.batch.model_copy(update={"errors": errors}).after(Event.FAIL, int(time.time()))
        log.warning("batch failed", batch_id=self.batch.id, reason=errors[0].code)
        wait_s = FIRST_WAIT_S
        while True:
            with contextlib.suppress(SplitfireError):
                await self._make_files()
                await self._disk(self._store.save, self.batch)
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MOST_WAIT_S)

    async def _advance(self, event: Event) -> None:
        batch = self.batch.after(event, int(time.time()))
        await self._disk(self._store.save, batch)
        self.batch = batch

    def _count(self) -> None:
        rows = self._rows
        assert rows is not None
        counted = {"completed": rows.completed, "failed": rows.failed, "used": rows.used}
        self.batch = self.batch.model_copy(update=counted)

    def _close(self) -> None:
        if self._rows is not None:
            with contextlib.suppress(OSError):
                self._rows.close()
        if self._input >= 0:
            os.close(self._input)
            self._input = -1


@contextlib.contextmanager
def _named_file(file_id: str) -> Iterator[None]:
    """What a batch is told whose file is gone."""
    try:
        yield
    except NotFound as exc:
        raise NotFound(f"{file_id} is no longer there", reason=exc.reason) from exc
