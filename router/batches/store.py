"""The directory of files and batches. On the disk thread alone; several processes may use one directory.

    TENANT/files/ID/record.json, content
    TENANT/batches/ID/record.json, lock, cancel, reserve, output/content, errors/content
    open/TENANT.ID       a batch that is not over
    new/ID/              what is not whole yet, or is being deleted; what is left there goes after a while

A record is replaced by renaming, a file or a batch comes and goes by renaming its directory: so each is there whole or not at all. Paths
are made of ids of ours and of hashes of tenants' names; nothing that a client says becomes part of one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from router.batches.records import BATCH, FILE, StoredBatch, StoredFile, is_id
from splitfire.core import limits
from splitfire.core.errors import ConfigError, InvalidInput

log = structlog.get_logger("router")
RECORD, CONTENT, LOCK, CANCEL, OUTPUT, ERRORS = "record.json", "content", "lock", "cancel", "output", "errors"
OPEN, NEW, RESERVE = "open", "new", "reserve"
IS_TENANT = re.compile(r"[0-9a-f]{32}")  # nothing else in there is ours, such as lost+found
RESERVE_BYTES = 64 * 1024  # of each batch that is not over: on a full disk it is room for saying so
STALE_S = 2 * limits.UPLOAD_S  # nobody works on something in `new` for as long
READ_BYTES = 256 * 1024
Stored = TypeVar("Stored", StoredFile, StoredBatch)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all tenants' files, or of one's."""

    num_files: int
    num_bytes: int


class Draft:
    """A file that is being written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_bytes = 0
        directory.mkdir(mode=0o700)
        self._content = os.open(directory / CONTENT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, piece: bytes) -> None:
        done = 0
        while done < len(piece):
            done += os.write(self._content, piece[done:])
        self.num_bytes += len(piece)

    def sync(self) -> None:
        os.fsync(self._content)

    def close(self) -> None:
        if self._content >= 0:
            os.close(self._content)
            self._content = -1

    def discard(self) -> None:
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class FileStore:
    """`max_bytes`: of all files together, answers that are still being written among them."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._root = root

    def open(self) -> None:
        """ConfigError when the directory cannot be used."""
        try:
            for path in (self._root, self._root / OPEN, self._root / NEW):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._root / NEW / f".{os.getpid()}"
            probe.mkdir()
            probe.rmdir()
        except OSError as exc:
            raise ConfigError(f"files_dir {self._root}: {exc.strerror or exc}; give a directory that can be written") from exc

    # -- files

    def draft(self, file_id: str) -> Draft:
        return Draft(self._root / NEW / file_id)

    def add_file(self, tenant: str, draft: Draft, file: StoredFile) -> None:
        draft.sync()
        draft.close()
        _write_record(draft.directory, file)
        _move(draft.directory, self._files(tenant) / file.id)

    def adopt(self, tenant: str, directory: Path, file: StoredFile) -> None:
        """The content of `directory` becomes a file. Nothing, where it has before."""
        if directory.exists():
            _write_record(directory, file)
            _move(directory, self._files(tenant) / file.id)

    def size(self, directory: Path) -> int:
        """Of the content in it; 0 where there is none."""
        return _size(directory / CONTENT)

    def file(self, tenant: str, file_id: str) -> StoredFile | None:
        """None: it is not there, for this tenant or for anybody, or no longer."""
        if not is_id(file_id, FILE):
            return None
        file = _read_record(self._files(tenant) / file_id, StoredFile)
        return None if file is None or _is_expired(file) else file

    def files(self, tenant: str, *, is_ascending: bool) -> Iterator[StoredFile]:
        for name in _names(self._files(tenant), is_ascending=is_ascending):
            file = self.file(tenant, name)
            if file is not None:
                yield file

    def content(self, tenant: str, file_id: str) -> int:
        """A descriptor to read from, which goes on after a deletion. FileNotFoundError."""
        return os.open(self._files(tenant) / file_id / CONTENT, os.O_RDONLY)

    def delete_file(self, tenant: str, file_id: str) -> None:
        """InvalidInput while a batch that is not over reads it."""
        for batch in self.open_batches(tenant):
            if file_id == batch.input_file_id:
                raise InvalidInput("file_id", f"{batch.id} reads it; cancel that first", reason="file_in_use")
        self._remove(self._files(tenant) / file_id)

    def usage(self, tenant: str | None = None) -> Usage:
        """By what is on the disk now."""
        num_files = num_bytes = 0
        for directory in self._tenants() if tenant is None else [self._root / _tenant_dir(tenant)]:
            for content in directory.glob(f"files/*/{CONTENT}"):
                num_files += 1
                num_bytes += _size(content)
            for content in directory.glob(f"batches/*/*/{CONTENT}"):
                num_bytes += _size(content)
        if tenant is None:
            num_bytes += sum(_size(content) for content in (self._root / NEW).glob(f"*/{CONTENT}"))
        return Usage(num_files, num_bytes)

    def sweep(self) -> None:
        """Files whose time is over, and what a process that was killed left behind."""
        oldest = time.time() - STALE_S
        for path in (self._root / NEW).iterdir():
            if _changed_at(path) < oldest:
                shutil.rmtree(path, ignore_errors=True)
        for directory in self._tenants():
            in_use = {batch.input_file_id for batch in self._open_in(directory.name)}
            for name in _names(directory / "files", is_ascending=True):
                file = _read_record(directory / "files" / name, StoredFile)
                if file is not None and _is_expired(file) and file.id not in in_use:
                    self._remove(directory / "files" / name)

    # -- batches

    def add_batch(self, batch: StoredBatch) -> None:
        """From here on somebody runs it."""
        tenant_dir = _tenant_dir(batch.tenant)
        directory = self._root / NEW / batch.id
        for path in (directory, directory / OUTPUT, directory / ERRORS):
            path.mkdir(mode=0o700)
        with (directory / RESERVE).open("wb") as reserve:
            os.posix_fallocate(reserve.fileno(), 0, RESERVE_BYTES)
        (directory / RESERVE).chmod(0o600)
        _write_record(directory, batch)
        (self._root / OPEN / f"{tenant_dir}.{batch.id}").touch(mode=0o600)  # first: what is not told here is never run
        _move(directory, self._root / tenant_dir / "batches" / batch.id)

    def batch(self, tenant: str, batch_id: str) -> StoredBatch | None:
        return _read_record(self._batches(tenant) / batch_id, StoredBatch) if is_id(batch_id, BATCH) else None

    def batches(self, tenant: str) -> Iterator[StoredBatch]:
        """The latest first."""
        for name in _names(self._batches(tenant), is_ascending=False):
            batch = self.batch(tenant, name)
            if batch is not None:
                yield batch

    def open_batches(self, tenant: str) -> list[StoredBatch]:
        """Those of a tenant that are not over."""
        return list(self._open_in(_tenant_dir(tenant)))

    def all_open(self) -> list[StoredBatch]:
        """The oldest first."""
        found = []
        for marker in sorted((self._root / OPEN).iterdir(), key=lambda path: path.name.partition(".")[2]):
            tenant_dir, _, batch_id = marker.name.partition(".")
            if not is_id(batch_id, BATCH):
                continue
            batch = _read_record(self._root / tenant_dir / "batches" / batch_id, StoredBatch)
            if batch is not None and not batch.is_over:
                found.append(batch)
            elif batch is None and (self._root / tenant_dir / "batches" / batch_id / RECORD).exists():
                log.warning("batch cannot be read", batch_id=batch_id)  # such as one of a later version
            elif _changed_at(marker) < time.time() - STALE_S:  # who was to make it, or to take the marker away, was killed
                marker.unlink(missing_ok=True)
        return found

    def save(self, batch: StoredBatch) -> None:
        """By the process that runs it alone."""
        _write_record(self.directory(batch), batch)
        if batch.is_over:
            (self._root / OPEN / f"{_tenant_dir(batch.tenant)}.{batch.id}").unlink(missing_ok=True)

    def use_reserve(self, batch: StoredBatch) -> None:
        """What is written next has room."""
        (self.directory(batch) / RESERVE).unlink(missing_ok=True)

    def directory(self, batch: StoredBatch) -> Path:
        return self._batches(batch.tenant) / batch.id

    def lock(self, batch: StoredBatch) -> int | None:
        """A descriptor: as long as it is open, or its process lives, no other gets one. None: another has it."""
        descriptor = os.open(self.directory(batch) / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(descriptor)
            if exc.errno == errno.EWOULDBLOCK:
                return None
            raise
        return descriptor

    def cancel(self, batch: StoredBatch) -> None:
        """Whoever runs it looks."""
        (self.directory(batch) / CANCEL).touch(mode=0o600)

    def is_cancelled(self, batch: StoredBatch) -> bool:
        return (self.directory(batch) / CANCEL).exists()

    def forget_oldest(self, tenant: str) -> None:
        """So that there is room for one more: the record of the oldest that is over goes, its files stay."""
        names = _names(self._batches(tenant), is_ascending=True)
        for name in names if len(names) >= limits.MAX_BATCHES else ():
            batch = self.batch(tenant, name)
            if batch is None or batch.is_over:
                self._remove(self._batches(tenant) / name)
                return

    # -- paths

    def _files(self, tenant: str) -> Path:
        return self._root / _tenant_dir(tenant) / "files"

    def _batches(self, tenant: str) -> Path:
        return self._root / _tenant_dir(tenant) / "batches"

    def _tenants(self) -> list[Path]:
        return [path for path in self._root.iterdir() if IS_TENANT.fullmatch(path.name)]

    def _open_in(self, tenant_dir: str) -> Iterator[StoredBatch]:
        for marker in (self._root / OPEN).glob(f"{tenant_dir}.*"):
            batch = _read_record(self._root / tenant_dir / "batches" / marker.name.partition(".")[2], StoredBatch)
            if batch is not None and not batch.is_over:
                yield batch

    def _remove(self, directory: Path) -> None:
        """FileNotFoundError when somebody else did before."""
        gone = self._root / NEW / f"{directory.name}.{os.getpid()}.{time.monotonic_ns()}"
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _tenant_dir(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def _read_record(directory: Path, kind: type[Stored]) -> Stored | None:
    try:
        return kind.model_validate_json((directory / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as exc:
        log.error(
            "files: a record cannot be read", path=str(directory / RECORD), detail=str(exc.errors(include_input=False)[0]["msg"])
        )
        return None


def _write_record(directory: Path, record: BaseModel) -> None:
    new = directory / f"{RECORD}.{os.getpid()}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        content = record.model_dump_json().encode()
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, "a record was not written whole")
        os.fsync(descriptor)
        new.rename(directory / RECORD)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync(directory)


def _move(directory: Path, target: Path) -> None:
    for parent in (target.parent.parent, target.parent):
        parent.mkdir(mode=0o700, exist_ok=True)
    directory.rename(target)
    _sync(target.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(directory: Path, *, is_ascending: bool) -> list[str]:
    """Ids begin with the time."""
    try:
        return sorted(os.listdir(directory), reverse=not is_ascending)
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    return _stat(path, lambda found: found.st_size, 0)


def _changed_at(path: Path) -> float:
    return _stat(path, lambda found: found.st_mtime, time.time())


Fact = TypeVar("Fact", int, float)


def _stat(path: Path, look: Callable[[os.stat_result], Fact], gone: Fact) -> Fact:
    """`gone`: of what somebody else took away meanwhile."""
    try:
        return look(path.stat())
    except FileNotFoundError:
        return gone


def _is_expired(file: StoredFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()
