"""What a batch reads and writes: its lines, and a row for each, in the file of answers or in that of errors. On the disk thread alone."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.batches.records import LineError, TokensUsed
from router.batches.store import CONTENT, ERRORS, OUTPUT, FileStore
from splitfire.core import limits
from splitfire.core.batch_lines import BatchRequest, CustomIds, digest_of, parse_line, read_lines
from splitfire.core.errors import InvalidInput
from splitfire.core.row_file import RowFile

SLICE_BYTES, SLICE_LINES = 256 * 1024, 256  # that are looked at in one go: some milliseconds of what threads of Python share
CHECK_BYTES = 16 << 20  # that are written between two looks at how much there is in all


@dataclass(frozen=True, slots=True)
class Next:
    """A line that has no row yet. Without `request`: those looked at had one; ask again."""

    offset: int
    request: BatchRequest | None


class Validation:
    """Whether every line of a file is a request, and each has its own custom_id. To be closed, and nothing is read before `step`."""

    def __init__(self, descriptor: int, endpoint: str) -> None:
        self.num_lines = 0
        self.errors: list[LineError] = []
        self._file = os.fdopen(os.dup(descriptor), "rb")
        self._file.seek(0)
        self._lines = read_lines(self._file)
        self._endpoint = endpoint
        self._ids = CustomIds()

    def step(self) -> bool:
        """One slice; whether that was the last."""
        num_bytes = 0
        while num_bytes < SLICE_BYTES:
            line = next(self._lines, None)
            if line is None:
                if not self.num_lines:
                    self.errors.append(LineError(code="empty_file", message="the file has no line"))
                return True
            num_bytes += len(line.content)
            self.num_lines += 1
            if self.num_lines > limits.MAX_BATCH_LINES:
                message = f"the file has more than {limits.MAX_BATCH_LINES} lines; make several batches of it"
                self.errors.append(LineError(code="too_many_lines", message=message, line=line.number))
            else:
                self._check(line.number, line.content)
            if self.num_lines > limits.MAX_BATCH_LINES or len(self.errors) >= limits.MAX_BATCH_ERRORS:
                return True
        return False

    def close(self) -> None:
        self._file.close()

    def _check(self, number: int, content: bytes) -> None:
        try:
            request = parse_line(content)
            if request.url != self._endpoint:
                raise InvalidInput("url", f"is {request.url}, the batch's endpoint is {self._endpoint}")
            self._ids.add(request.custom_id, number)
        except InvalidInput as exc:
            self.errors.append(LineError(code=exc.reason, message=f"line {number}: {exc}", line=number, param=exc.field))


class Lines:
    """The requests of a file that was found valid, one after the other. To be closed, and nothing is read before `take`."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(os.dup(descriptor), "rb")
        self._file.seek(0)
        self._lines = read_lines(self._file)

    def take(self, rows: Rows) -> Next | None:
        """None: there are no more."""
        for _ in range(SLICE_LINES):
            line = next(self._lines, None)
            if line is None:
                return None
            request = parse_line(line.content)
            if not rows.has(request.custom_id):
                return Next(line.offset, request)
        return Next(0, None)

    def again(self, offset: int) -> BatchRequest:
        """The request at an offset that `take` told."""
        content = os.pread(self._file.fileno(), limits.MAX_BATCH_LINE_BYTES + 1024, offset).partition(b"\n")[0]
        return parse_line(content.removeprefix(b"\xef\xbb\xbf").strip())

    def close(self) -> None:
        self._file.close()


class Rows:
    """At most one for each custom_id, whatever ended the processes that wrote them. Counts are of what is in the files."""

    def __init__(self, store: FileStore, directory: Path) -> None:
        self.completed = self.failed = 0
        self.used = TokensUsed()
        self._store = store
        self._done: set[bytes] = set()
        self._output = RowFile(directory / OUTPUT / CONTENT)
        self._errors = RowFile(directory / ERRORS / CONTENT)
        self._unchecked = CHECK_BYTES  # bytes since somebody looked whether there is room
        for row in self._output.rows():
            self._note(row)
            self.completed += 1
            usage = row["response"]["body"].get("usage", {})
            cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            self._use(usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0))
        for row in self._errors.rows():
            self._note(row)
            self.failed += 1

    def has(self, custom_id: str) -> bool:
        return digest_of(custom_id) in self._done

    def add_answer(self, custom_id: str, row: bytes, prompt: int, cached: int, generated: int) -> None:
        """OSError, and no row, when there is no room for it."""
        if not self.has(custom_id):
            self._append(self._output, row)
            self._done.add(digest_of(custom_id))
            self.completed += 1
            self._use(prompt, cached, generated)

    def add_error(self, custom_id: str, row: bytes) -> None:
        if not self.has(custom_id):
            self._append(self._errors, row)
            self._done.add(digest_of(custom_id))
            self.failed += 1

    def close(self) -> None:
        """What was written outlives the machine; else OSError, and they are closed all the same."""
        try:
            self._output.sync()
            self._errors.sync()
        finally:
            self._output.close()
            self._errors.close()

    def _append(self, file: RowFile, row: bytes) -> None:
        self._unchecked += len(row)
        if self._unchecked >= min(CHECK_BYTES, self._store.max_bytes // 16):
            if self._store.usage().num_bytes + len(row) > self._store.max_bytes:
                raise OSError(errno.ENOSPC, f"files together would be larger than {self._store.max_bytes} bytes (--files-bytes)")
            self._unchecked = 0
        file.append(row)

    def _note(self, row: dict[str, Any]) -> None:
        self._done.add(digest_of(row["custom_id"]))

    def _use(self, prompt: int, cached: int, generated: int) -> None:
        used = self.used
        self.used = TokensUsed(prompt=used.prompt + prompt, cached=used.cached + cached, generated=used.generated + generated)
