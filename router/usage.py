"""What was used, a line a request, in a file that is only ever appended to: each line carries the hash of the one before it, so what is
taken out or changed later is found (`splitfire usage --verify`).

Lines wait in memory and are written by a thread twice a second, so no request waits for a disk. Several router processes may share
the file: they take turns by a lock, and continue whatever the last line is. A file of MAX_BYTES is renamed and goes on in a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import structlog

from router.ended import Ended
from splitfire.core.errors import ConfigError
from splitfire.core.usage import Price, UsageLine, chained, hash_of_last, read_prices

log = structlog.get_logger("usage")
FLUSH_S = 0.5
CLOSE_S = 2.0
MAX_WAITING = 50_000  # lines, while the disk is full; more are dropped and counted
MAX_BYTES = 64 << 20


class UsageLog:
    """`add` from the event loop; the file belongs to the thread."""

    def __init__(self, path: Path, prices: dict[str, Price], max_bytes: int = MAX_BYTES) -> None:
        """ConfigError when the file cannot be written."""
        self.num_dropped = 0
        self._path = path
        self._prices = prices
        self._max_bytes = max_bytes
        self._waiting: deque[UsageLine] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._has_failed = False
        self._has_outgrown = False
        try:
            with path.open("a+b") as file:
                hash_of_last(file)
        except OSError as exc:
            raise ConfigError(f"usage_file {path}: {exc.strerror or exc}; give another with --usage-file") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"usage_file {path}: holds something else than usage; give another with --usage-file") from exc
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def add(self, ended: Ended) -> None:
        """One more request; those that were refused before anything was computed are counted too, with nothing used."""
        if len(self._waiting) >= MAX_WAITING:
            self.num_dropped += 1
            return
        self._waiting.append(self._line(ended))

    def close(self) -> None:
        """Writes what is left, but never waits longer than CLOSE_S for it."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _line(self, ended: Ended) -> UsageLine:
        usage = ended.summary.usage
        return UsageLine(
            at=_now(),
            tenant=ended.tenant,
            key=ended.key_id,
            model=ended.model,
            request_id=ended.summary.request_id,
            outcome=ended.outcome,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_prompt_tokens,
            generated_tokens=usage.generated_tokens,
            prefill_s=round(ended.prefill_busy_s, 6),
            decode_s=round(ended.decode_busy_s, 6),
        )

    def _run(self) -> None:
        while True:
            is_closing = self._is_closing
            if self._waiting:
                self._flush()
            if is_closing:
                return
            self._wake.wait(FLUSH_S)

    def _flush(self) -> None:
        lines = [self._waiting[i] for i in range(len(self._waiting))]
        try:
            self._append(lines)
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as exc:  # they stay, and are tried again
            if not self._has_failed:
                log.error("usage cannot be written", path=str(self._path), error=str(exc), waiting=len(lines))
            self._has_failed = True
            return
        if self._has_failed:
            log.info("usage is written again", path=str(self._path), dropped=self.num_dropped)
        self._has_failed = False
        for _ in lines:
            self._waiting.popleft()

    def _append(self, lines: list[UsageLine]) -> None:
        with self._path.open("a+b", buffering=0) as file:  # what could not be written must not be waiting in a buffer
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_ino != self._path.stat().st_ino:
                raise BlockingIOError("another process has just begun a new file")
            end = file.seek(0, os.SEEK_END)
            last, whole = hash_of_last(file)
            if whole < end:  # cut off in the middle of a line, by a full disk or a kill
                file.truncate(whole)
            text = []
            for line in lines:
                row, last = chained(line, last, self._prices.get(line.model) or self._prices.get("*"))
                text.append(row)
            data = memoryview("".join(text).encode())
            size = whole + len(data)
            try:
                while data:
                    data = data[file.write(data) or 0 :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise
            if size >= self._max_bytes:
                self._begin_another(last)

    def _begin_another(self, last: str) -> None:
        """Under the lock of the full one. There is a file by that name at every moment, and it has its first line. Where that cannot be
        done, the file grows on: its lines are written."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        fresh, full = (self._path.with_name(f"{self._path.stem}-{stamp}{end}") for end in (".new", self._path.suffix))
        begin, _ = chained(UsageLine.continued(_now()), last, None)
        try:
            fresh.write_text(begin)
            full.hardlink_to(self._path)
            fresh.replace(self._path)
        except OSError as exc:
            if not self._has_outgrown:
                log.error("usage cannot go on in another file", path=str(self._path), error=str(exc))
            self._has_outgrown = True
            for left in (fresh, full):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)


def make_usage_log(path: Path | None, prices: Path | None) -> UsageLog | None:
    """None where nobody wants one. ConfigError names the file that cannot be used."""
    return UsageLog(path, read_prices(prices) if prices is not None else {}) if path is not None else None


def _now() -> str:
    """For people and their calendars; nothing is timed by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
