"""An event loop whose clock jumps: nothing sleeps, an hour passes in the time its callbacks take. Deterministic but for what is random."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager


class _JumpingSelector(selectors.SelectSelector):
    """Where a real loop would sleep, time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen: everybody waits for somebody"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual, and so is `time.monotonic` while `play` runs."""

    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


@contextmanager
def _clock_is(clock: Callable[[], float]) -> Iterator[None]:
    real = time.monotonic
    time.monotonic = clock
    try:
        yield
    finally:
        time.monotonic = real


def play(scene: Coroutine[object, object, None]) -> None:
    """Runs to its end in virtual time."""
    loop = VirtualLoop()
    with _clock_is(loop.time), asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scene)
