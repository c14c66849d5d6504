"""Two processes of ours, a core each, that do what this one tells them over a pipe; none outlives this one.

Instants may be compared across the two: `time.perf_counter` is one clock for all processes of a Linux host.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

SLOW_S = 60.0  # no single order takes this long
_PR_SET_PDEATHSIG = 1


class End:
    """One of the two, seen from here. Orders are answered one at a time."""

    def __init__(self, role: str, core: int) -> None:
        context = multiprocessing.get_context("spawn")  # UCX does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, role, core), name=f"{role}-end", daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, order: str, *args: Any) -> None:
        self._connection.send((order, args))

    def result(self) -> Any:
        if not self._connection.poll(SLOW_S):
            raise TimeoutError(f"{self._process.name} did not answer within {SLOW_S:g} s")
        answer, error = self._connection.recv()
        if error:
            raise RuntimeError(f"{self._process.name}: {error}")
        return answer

    def do(self, order: str, *args: Any) -> Any:
        self.begin(order, *args)
        return self.result()

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

    async def obey() -> None:
        node, has_order = Node(role), asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), has_order.set)
        while True:
            await has_order.wait()
            has_order.clear()
            while connection.poll():
                order, args = connection.recv()
                try:
                    answer = getattr(node, order)(*args)
                    connection.send((await answer if inspect.isawaitable(answer) else answer, ""))
                except Exception as exc:
                    connection.send((None, f"{order}: {type(exc).__name__}: {exc}"))

    with contextlib.suppress(EOFError):
        uvloop.run(obey())
    os._exit(0)  # endpoints of UCX may block in their destructors
