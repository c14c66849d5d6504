"""Hosts the engine on a thread of its own. The io thread posts commands; results come back through the event loop.

Everything a step produced arrives in one call of `on_step`, on the io thread, in order. An exception of the loop itself
is a bug or a broken device: the process must not limp on, so `on_crash` ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import structlog

from splitfire.engine.engine import NOTHING, Engine
from splitfire.engine.lending import Reservation
from splitfire.engine.sequence import SeqId, SequenceSpec
from splitfire.engine.updates import StepResult
from splitfire.worker.stacks import with_large_stack

log = structlog.get_logger("worker")
STARVED_S = 0.02  # until looking again when sequences wait but nothing can run


class EngineHost:
    """Owner of the engine thread. All methods are for the io thread and return at once."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        on_started: Callable[[tuple[SeqId, ...]], None],
        on_step: Callable[[StepResult], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self._loop = loop
        self._on_step = on_step
        self._on_crash = on_crash
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()  # bounded by the attempts a worker accepts
        self._is_stopping = False
        self.last_turn = time.monotonic()
        self.latest = NOTHING  # what is told, or was told last
        engine.on_started = lambda ids: self._post(on_started, ids)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        with_large_stack(self._thread.start)

    def stop(self) -> None:
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join(timeout=5)

    def add(self, spec: SequenceSpec) -> None:
        self._command(lambda: self.engine.add(spec))

    def join(self, reservation: Reservation, first_tokens: Mapping[SeqId, int]) -> None:
        self._command(lambda: self.engine.join(reservation, first_tokens))

    def finish(self, seq_id: SeqId) -> None:
        self._command(lambda: self.engine.finish(seq_id))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as exc:
            log.exception("engine loop failed")
            self._post(self._on_crash, exc)

    def _turn(self) -> bool:
        """Waits for something to do, obeys commands, computes one step. False when stopping."""
        with self._wake:
            while not (self._commands or self._is_stopping or self.engine.has_work):
                self._wake.wait()
            if self._is_stopping:
                return False
            commands, self._commands = self._commands, deque()
        self.last_turn = time.monotonic()
        for command in commands:
            command()
        result = self.engine.step()
        if result.num_rows:
            self._post(self._tell, result)
        elif self.engine.has_work:
            with self._wake:
                if not self._commands:
                    self._wake.wait(STARVED_S)
        return True

    def _tell(self, result: StepResult) -> None:
        self.latest = result
        self._on_step(result)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(call, *args)
