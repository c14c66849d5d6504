"""Facts of process life that every service shares."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from google.protobuf.internal import api_implementation

from splitfire.core.errors import ConfigError
from splitfire.core.flags import PARENT_VARIABLE

MIN_OPEN_FILES = 1024
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
