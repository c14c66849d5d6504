"""Facts of process life that every service shares."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
from typing import NoReturn

from google.protobuf.internal import api_implementation

from splitfire.core.errors import ConfigError
from splitfire.core.flags import PARENT_VARIABLE

MIN_OPEN_FILES = 1024
END_S = 8.0  # for saying goodbye, after the grace time
UNSAID = 120  # the exit code when what was said could not be written, as Python has it
_PR_SET_PDEATHSIG = 1


def require_environment() -> None:
    """ConfigError when this process could not do its work later: too few files, or protobuf's slow parser (no recursion limit)."""
    if api_implementation.Type() != "upb":
        raise ConfigError(
            f"protobuf uses its {api_implementation.Type()} parser, accepted: upb; unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        raise ConfigError(
            f"this process may open {hard} files, it needs {MIN_OPEN_FILES}; raise the limit (ulimit -n {MIN_OPEN_FILES})"
        )
    if soft < MIN_OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_OPEN_FILES, hard))


def end_with_parent() -> None:
    """A child of `splitfire up` gets SIGTERM when its supervisor is gone, even if that was killed. Linux only."""
    parent = os.environ.get(PARENT_VARIABLE)
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent:  # it was gone already
        os.kill(os.getpid(), signal.SIGTERM)


def end_soon() -> None:
    """Nothing is served any more: within END_S this process is gone, with code 1 where something still blocked it, also if that was in
    a library and held the interpreter's lock. What every thread did then is written to stderr."""
    faulthandler.dump_traceback_later(END_S, exit=True)


def end_now(code: int) -> NoReturn:
    """Nothing is left to save. Libraries' destructors and threads are not waited for: some block once their peers are dead."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads, or the disk is full
        code = code or UNSAID
    os._exit(code)
