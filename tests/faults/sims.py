"""What fault tests share: a simulated fleet for the length of a test, and moments to act at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from structlog.testing import capture_logs

from tests.model.simulator import Simulation, SimWorker, WorkerPlan

IN_PLACE = True  # how payloads go; conftest.py runs every test both ways


@asynccontextmanager
async def fleet(
    seed: int = 1, prefill: int | list[WorkerPlan] = 2, decode: int | list[WorkerPlan] = 2
) -> AsyncIterator[Simulation]:
    """What a boundary of failure had to catch is a bug, whatever became of the request: no test here may leave one behind."""
    with capture_logs() as logs:
        sim = Simulation(seed, in_place=IN_PLACE)
        sim.start(prefill, decode)
        await until(sim.have_all_met)
        try:
            yield sim
        finally:
            sim.close()
    caught = [line for line in logs if line.get("exc_info")]
    assert not caught, caught


def at_payload(sim: Simulation, number: int, act: Callable[[], object]) -> None:
    """Acts when the payload of that number has arrived, before it is looked at."""
    seen = 0

    def count(_message: memoryview) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act()

    sim.net.damage = count


def sender_of(sim: Simulation) -> SimWorker:
    """The prefill worker with a transfer."""
    return next(w for w in sim.workers.values() if w.name.startswith("p") and not w.is_dead and len(w.agent._outgoing))


def receiver_of(sim: Simulation) -> SimWorker:
    """The decode worker with a transfer."""
    return next(w for w in sim.workers.values() if w.name.startswith("d") and not w.is_dead and len(w.agent._incoming))


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """In virtual time, a millisecond at a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        await asyncio.sleep(0.001)
