"""/v1/files and /v1/batches. Each tenant sees its own, and of others' not even that they are there. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from router.batches.disk import Disk
from router.batches.form import Form
from router.batches.records import BATCH, FILE, StoredBatch, StoredFile, is_id, new_id
from router.batches.rows import CHECK_BYTES
from router.batches.runner import BatchRunner
from router.batches.store import READ_BYTES, FileStore
from router.http_api import FILE_PATHS, Exchange, Handler, Routes
from router.openai.batches import (
    BatchBody,
    BatchQuery,
    FileQuery,
    batch_object,
    check_batch_metadata,
    file_object,
    list_object,
    read_form,
    read_query,
)
from router.openai.requests import read
from splitfire.core import limits
from splitfire.core.errors import Exhausted, InvalidInput, NotFound, SplitfireError

FORM_BYTES = 64 * 1024  # of an upload, beside the file
BYTES = b"application/octet-stream"


class BatchApi:
    """`model`: the name of what is served."""

    def __init__(self, store: FileStore, disk: Disk, runner: BatchRunner, model: Callable[[], str]) -> None:
        self._store = store
        self._disk = disk
        self._runner = runner
        self._model = model
        self._num_uploads = 0

    def routes(self) -> Routes:
        handlers: dict[str, dict[str, Handler]] = {
            "/v1/files": {"GET": self._list_files, "POST": self._upload},
            "/v1/files/*": {"GET": self._show_file, "DELETE": self._delete_file},
            "/v1/files/*/content": {"GET": self._show_content},
            "/v1/batches": {"GET": self._list_batches, "POST": self._create},
            "/v1/batches/*": {"GET": self._show_batch},
            "/v1/batches/*/cancel": {"POST": self._cancel},
        }
        assert {path: tuple(methods) for path, methods in handlers.items()} == FILE_PATHS
        return handlers

    # -- files

    async def _upload(self, exchange: Exchange) -> None:
        try:
            with self._uploading():
                file = await self._receive(exchange, _tenant(exchange))
        except SplitfireError:
            await exchange.skip_body()
            raise
        await _answer(exchange, file_object(file))

    async def _receive(self, exchange: Exchange, tenant: str) -> StoredFile:
        form = Form(exchange.header("content-type"))
        num_files = (await self._disk(self._store.usage, tenant)).num_files
        if num_files >= limits.MAX_FILES:
            message = f"there are {num_files} files already, limit {limits.MAX_FILES}; delete some"
            raise InvalidInput("file", message, reason="files_full")
        now = time.time()
        draft = await self._disk(self._store.draft, new_id(FILE, now))
        try:
            unchecked = CHECK_BYTES
            async for piece in exchange.pieces(limits.MAX_UPLOAD_BYTES + FORM_BYTES, limits.UPLOAD_S):
                if content := form.feed(piece):
                    unchecked += len(content)
                    if unchecked >= min(CHECK_BYTES, self._store.max_bytes // 16):
                        unchecked = await self._require_room(len(content))
                    if draft.num_bytes + len(content) > limits.MAX_UPLOAD_BYTES:
                        message = f"is larger than {limits.MAX_UPLOAD_BYTES} bytes"
                        raise InvalidInput("file", message, reason="file_too_large")
                    await self._disk(draft.write, content)
            form.end()
            fields = read_form(form.values)
            if not draft.num_bytes:
                raise InvalidInput("file", "is empty")
            seconds = fields.expires_after.seconds if fields.expires_after is not None else limits.MAX_FILE_AGE_S
            file = StoredFile(
                id=draft.directory.name, num_bytes=draft.num_bytes, created_at=int(now), filename=form.filename or "",
                purpose=fields.purpose, expires_at=int(now) + seconds,
            )  # fmt: skip
            await self._disk(self._store.add_file, tenant, draft, file)
        except BaseException:
            await asyncio.shield(self._disk(draft.discard))
            raise
        return file

    async def _require_room(self, num_bytes: int) -> int:
        """0 bytes are unchecked then."""
        used = (await self._disk(self._store.usage)).num_bytes
        if used + num_bytes > self._store.max_bytes:
            message = (
                f"all files together would be larger than {self._store.max_bytes} bytes; delete some, or ask who runs this server"
            )
            raise InvalidInput("file", message, reason="files_full")
        return 0

    @contextlib.contextmanager
    def _uploading(self) -> Iterator[None]:
        if self._num_uploads == limits.MAX_UPLOADS:
            raise Exhausted(f"{limits.MAX_UPLOADS} files are uploaded now, limit {limits.MAX_UPLOADS}", reason="uploads_full")
        self._num_uploads += 1
        try:
            yield
        finally:
            self._num_uploads -= 1

    async def _list_files(self, exchange: Exchange) -> None:
        query = read_query(FileQuery, exchange.query)
        is_ascending = query.order == "asc"

        def take() -> list[StoredFile]:
            found = (file for file in self._store.files(_tenant(exchange), is_ascending=is_ascending))
            wanted = (file for file in found if not query.purpose or file.purpose == query.purpose)
            return list(itertools.islice(_behind(wanted, query.after, FILE, is_ascending=is_ascending), query.limit + 1))

        await _answer_list(exchange, [file_object(file) for file in await self._disk(take)], query.limit)

    async def _show_file(self, exchange: Exchange) -> None:
        await _answer(exchange, file_object(await self._file(exchange)))

    async def _delete_file(self, exchange: Exchange) -> None:
        file = await self._file(exchange)
        await self._disk(self._store.delete_file, _tenant(exchange), file.id)
        await _answer(exchange, {"id": file.id, "object": "file", "deleted": True})

    async def _show_content(self, exchange: Exchange) -> None:
        file = await self._file(exchange)
        descriptor = await self._disk(self._store.content, _tenant(exchange), file.id)
        try:
            await exchange.begin(200, BYTES, ((b"content-length", str(file.num_bytes).encode()),))
            for offset in range(0, file.num_bytes, READ_BYTES):
                piece = await self._disk(os.pread, descriptor, min(READ_BYTES, file.num_bytes - offset), offset)
                async with asyncio.timeout(limits.SLOW_CLIENT_S):
                    await exchange.write(piece, is_last=offset + READ_BYTES >= file.num_bytes)
        except (SplitfireError, TimeoutError):  # half a file must not look like one
            exchange.abort()
        finally:
            await asyncio.shield(self._disk(os.close, descriptor))

    # -- batches

    async def _create(self, exchange: Exchange) -> None:
        asked, tenant = read(BatchBody, await exchange.body()), _tenant(exchange)
        check_batch_metadata(asked.metadata)
        now = time.time()
        batch = StoredBatch(
            id=new_id(BATCH, now), tenant=tenant, endpoint=asked.endpoint, input_file_id=asked.input_file_id,
            output_file_id=new_id(FILE, now), error_file_id=new_id(FILE, now), created_at=int(now),
            expires_at=int(now + limits.BATCH_WINDOW_S), metadata=asked.metadata,
            output_expires_s=asked.output_expires_after.seconds if asked.output_expires_after is not None else None,
        )  # fmt: skip
        await self._disk(self._add, batch)
        self._runner.kick()
        await _answer(exchange, batch_object(batch, self._model()))

    def _add(self, batch: StoredBatch) -> None:
        file = self._store.file(batch.tenant, batch.input_file_id)
        if file is None:
            raise NotFound("input_file_id: there is no such file", reason="file_not_found", field="input_file_id")
        if file.purpose != "batch":
            raise InvalidInput("input_file_id", f"is a file of purpose {file.purpose}, accepted: batch")
        num_open = len(self._store.open_batches(batch.tenant))
        if num_open >= limits.MAX_OPEN_BATCHES:
            raise Exhausted(
                f"{num_open} batches are not over, limit {limits.MAX_OPEN_BATCHES}", reason="batches_full", retry_after_s=60.0
            )
        self._store.forget_oldest(batch.tenant)
        self._store.add_batch(batch)

    async def _show_batch(self, exchange: Exchange) -> None:
        await _answer(exchange, await self._described(await self._batch(exchange)))

    async def _list_batches(self, exchange: Exchange) -> None:
        query = read_query(BatchQuery, exchange.query)

        def take() -> list[StoredBatch]:
            found = _behind(self._store.batches(_tenant(exchange)), query.after, BATCH, is_ascending=False)
            return list(itertools.islice(found, query.limit + 1))

        shown = [await self._described(batch) for batch in await self._disk(take)]
        await _answer_list(exchange, shown, query.limit)

    async def _cancel(self, exchange: Exchange) -> None:
        """One that is over stays as it is."""
        await exchange.skip_body()
        batch = await self._batch(exchange)
        if not batch.is_over:
            await self._disk(self._store.cancel, batch)
            self._runner.kick()
        await _answer(exchange, await self._described(batch))

    async def _described(self, batch: StoredBatch) -> dict[str, Any]:
        is_cancelling = not batch.is_over and await self._disk(self._store.is_cancelled, batch)
        return batch_object(self._runner.live(batch), self._model(), is_cancelling=is_cancelling)

    # -- what a path names

    async def _file(self, exchange: Exchange) -> StoredFile:
        file = await self._disk(self._store.file, _tenant(exchange), _named(exchange))
        if file is None:
            raise NotFound("there is no such file", reason="file_not_found", field="file_id")
        return file

    async def _batch(self, exchange: Exchange) -> StoredBatch:
        batch = await self._disk(self._store.batch, _tenant(exchange), _named(exchange))
        if batch is None:
            raise NotFound("there is no such batch", reason="batch_not_found", field="batch_id")
        return batch


def _behind(items: Iterator[Any], after: str, prefix: str, *, is_ascending: bool) -> Iterator[Any]:
    """Those after an id in the order of the list; ids begin with the time, so it need not be there any more."""
    if not after:
        return items
    if not is_id(after, prefix):
        raise InvalidInput("after", "is no id of this list")
    return (item for item in items if (item.id > after if is_ascending else item.id < after))


def _named(exchange: Exchange) -> str:
    return exchange.path.split("/")[3]


def _tenant(exchange: Exchange) -> str:
    assert exchange.tenant is not None, "these paths need a key"
    return exchange.tenant.name


async def _answer(exchange: Exchange, value: dict[str, Any]) -> None:
    await exchange.answer(json.dumps(value).encode())


async def _answer_list(exchange: Exchange, found: list[dict[str, Any]], limit: int) -> None:
    await _answer(exchange, list_object(found[:limit], has_more=len(found) > limit))
