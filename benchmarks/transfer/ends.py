"""Two processes of ours, a core each, that do what this one tells them over a pipe; none outlives this one.

Instants may be compared across the two: `time.perf_counter` is one clock for all processes of a Linux host.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from benchmarks.orders import Orders, obey

SLOW_S = 60.0  # no single order takes this long
_PR_SET_PDEATHSIG = 1


class End(Orders):
    """One of the two, seen from here."""

    def __init__(self, role: str, core: int) -> None:
        context = multiprocessing.get_context("spawn")  # UCX does not survive a fork
        mine, theirs = context.Pipe()
        super().__init__(f"{role}-end", mine, SLOW_S)
        self._process = context.Process(target=_serve, args=(theirs, role, core), name=f"{role}-end", daemon=True)
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def two_ends(cores: Sequence[int]) -> Iterator[tuple[End, End]]:
    """The sending and the receiving process, introduced to each other."""
    ends: list[End] = []
    try:
        for role, core in zip(("sending", "receiving"), cores, strict=True):
            ends.append(End(role, core))
        cards = [end.do("card") for end in ends]
        for end, other in zip(ends, reversed(cards), strict=True):
            end.do("meet", other)
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.kill()


def pin_for_life(core: int) -> None:
    """One core, no life without the parent, and Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {core})


def _serve(connection: Connection, role: str, core: int) -> None:
    pin_for_life(core)
    import uvloop  # noqa: PLC0415  only after pinning: threads of what is loaded inherit it

    from benchmarks.transfer.node import Node  # noqa: PLC0415

    async def serve() -> None:
        await obey(connection, Node(role))

    with contextlib.suppress(EOFError):
        uvloop.run(serve())
    os._exit(0)  # endpoints of UCX may block in their destructors
