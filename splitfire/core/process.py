"""Facts of process life that every service shares."""

from __future__ import annotations

import ctypes
import os
import signal

from splitfire.core.settings import PARENT_VARIABLE

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """A child of `splitfire up` gets SIGTERM when its supervisor is gone, even if that was killed. Linux only."""
    parent = os.environ.get(PARENT_VARIABLE)
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent:  # it was gone already
        os.kill(os.getpid(), signal.SIGTERM)
