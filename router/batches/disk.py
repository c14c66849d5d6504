"""The one thread that touches the directory of files, so that the event loop never waits for a disk; and its errors as clients see them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import structlog

from splitfire.core.errors import Internal, NotFound, SplitfireError, Unavailable

log = structlog.get_logger("router")
FULL = (errno.ENOSPC, errno.EDQUOT)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Disk:
    """Calls run one after the other. One that was begun is finished, whoever waited for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")

    async def __call__(self, do: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """OSErrors come back as what a client may know of them."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: do(*args, **kwargs))
        except OSError as exc:
            raise disk_error(exc) from exc


def disk_error(error: OSError) -> SplitfireError:
    """The path is for the log."""
    if isinstance(error, FileNotFoundError):  # somebody deleted it a moment ago
        return NotFound("it is no longer there", reason="file_not_found")
    log.error("files: the disk failed", detail=str(error))
    if error.errno in FULL:
        return Unavailable("the disk that files are kept on is full; delete some, or ask who runs this server", reason="disk_full")
    return Internal("files cannot be read or written now; the log has it under error_id", reason="disk_failed")
