"""`python -m tests.faults.proc.sick MODULE FLAGS`: the router or a worker as it is, but it can be taken ill.

SIGUSR1 kills a worker's engine thread in its next step, SIGUSR2 blocks the event loop, and the prompt POISON kills the process of whoever
begins to compute it. SICK_VERSION is the protocol version a worker says it speaks, SICK_HANG lets its engine hang instead of die.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import wraps

from router import __main__ as router_main
from router.server import RouterServer

POISON = (666, 667, 668, 669)
BLOCKED_S = 3.0
HANGS_AFTER_S = 2.0  # what a worker with a hung engine waits for a step, instead of a minute
VERSION, HANG = "SICK_VERSION", "SICK_HANG"


def ill_router() -> None:
    RouterServer.run = _listening(RouterServer.run, signal.SIGUSR2, _block)  # type: ignore[assignment,method-assign]
    router_main.main()


def ill_worker() -> None:
    from splitfire.engine.engine import Engine  # torch: not for the router
    from splitfire.engine.sequence import SequenceSpec
    from splitfire.engine.updates import StepResult
    from splitfire.worker import __main__ as worker_main
    from splitfire.worker import worker

    is_dying = threading.Event()
    add, step = Engine.add, Engine.step

    def swallow(self: Engine, spec: SequenceSpec) -> None:
        if spec.prompt[: len(POISON)] == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, spec)

    def collapse(self: Engine) -> StepResult:
        if is_dying.is_set():
            threading.Event().wait(60.0 if HANG in os.environ else 0.0)
            raise RuntimeError("the engine died, as it was told to")
        return step(self)

    Engine.add, Engine.step = swallow, collapse  # type: ignore[method-assign]
    if HANG in os.environ:
        worker.STUCK_S = HANGS_AFTER_S
    if VERSION in os.environ:
        major, minor = map(int, os.environ[VERSION].split("."))
        vars(worker).update(PROTOCOL_MAJOR=major, PROTOCOL_MINOR=minor)
    run = _listening(worker.Worker.run, signal.SIGUSR1, is_dying.set)
    worker.Worker.run = _listening(run, signal.SIGUSR2, _block)  # type: ignore[assignment,method-assign]
    worker_main.main()


def _block() -> None:
    time.sleep(BLOCKED_S)


def _listening(run: Callable[..., Awaitable[int]], number: int, act: Callable[[], None]) -> Callable[..., Awaitable[int]]:
    @wraps(run)
    async def listen(*args: object) -> int:
        asyncio.get_running_loop().add_signal_handler(number, act)
        return await run(*args)

    return listen


if __name__ == "__main__":
    module = sys.argv.pop(1)
    if module == "router":
        ill_router()
    else:
        ill_worker()
