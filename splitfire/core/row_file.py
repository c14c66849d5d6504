"""A file of JSON lines that grows by whole lines, whatever ends the process that writes it. One thread at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RowFile:
    """`rows`, to its end, before the first `append`: what was written last may not be whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.num_bytes = os.fstat(self._file).st_size

    @property
    def descriptor(self) -> int:
        return self._file

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row that is whole; what follows the last of them is cut off."""
        end = 0
        with self.path.open("rb") as file:
            for content in file:
                row = _read(content)
                if row is None:
                    break
                end += len(content)
                yield row
        if end < self.num_bytes:
            os.ftruncate(self._file, end)
            self.num_bytes = end

    def append(self, row: bytes) -> None:
        """OSError: nothing of it is there."""
        try:
            done = 0
            while done < len(row):
                done += os.write(self._file, row[done:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.num_bytes)
            raise
        self.num_bytes += len(row)

    def sync(self) -> None:
        """What was appended outlives the machine too."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read(content: bytes) -> dict[str, Any] | None:
    """None: it is no whole row."""
    if not content.endswith(b"\n"):
        return None
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
