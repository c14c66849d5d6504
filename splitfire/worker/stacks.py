"""Threads with room on their stack for whatever a router let through: it tried the same on a sixteenth of that."""

from __future__ import annotations

import threading
from collections.abc import Callable

STACK_BYTES = 64 << 20  # address space; only what is used takes memory


def with_large_stack(start: Callable[[], object]) -> None:
    """Threads that `start` starts get STACK_BYTES. Call it from one thread at a time."""
    before = threading.stack_size(STACK_BYTES)
    try:
        start()
    finally:
        threading.stack_size(before)
