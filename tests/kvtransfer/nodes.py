"""A transport with a notebook: what was delivered to it, and which operations completed how."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Coroutine

from kvtransfer.transport import Done, Link, Transport

SENTINEL = 0xA5


class Node:
    """`outcomes[name]` has one entry for each call of the `done` that `note(name)` gave."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.frames: list[bytes] = []
        self.outcomes: defaultdict[str, list[Exception | None]] = defaultdict(list)
        self._links: list[Link] = []

    def start(self) -> Node:
        self.transport.start(lambda frame: self.frames.append(bytes(frame)))
        return self

    def connect(self, other: Node) -> Link:
        """Kept as long as the node: UCX cancels what is on its way when an endpoint is forgotten without being closed."""
        self._links.append(self.transport.connect(other.transport.address))
        return self._links[-1]

    def note(self, name: str) -> Done:
        return self.outcomes[name].append

    def slot(self, num_bytes: int) -> memoryview:
        """Memory in which every byte that is written shows."""
        slot = self.transport.allocate(num_bytes).buffer
        slot[:] = bytes([SENTINEL]) * num_bytes
        return slot


def content(seed: int, num_bytes: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never came true"
        await asyncio.sleep(0.001)


async def settle() -> None:
    """Time for what should not happen to happen."""
    for _ in range(20):
        await asyncio.sleep(0.002)


def play(scene: Coroutine[object, object, None], run: Callable[[Coroutine[object, object, None]], None] = asyncio.run) -> None:
    """Runs a scene that must end in time and leave no unhandled exception behind."""
    unhandled: list[object] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
        async with asyncio.timeout(60):
            await scene

    run(watched())
    assert not unhandled
