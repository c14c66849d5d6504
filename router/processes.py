"""Pools of processes that may be killed: whatever a client's text makes them do, it costs its own answer and nothing else.

Both ends speak length-prefixed JSON, one answer a question; the other end is answering.py. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import structlog

from splitfire.core.errors import ConfigError, ModelError

log = structlog.get_logger("router")
START_TIMEOUT_S = 30.0
RESTART_S = 1.0  # between tries to start one
MAX_ANSWER_BYTES = 64 << 20
Answer = dict[str, Any]


class Died(Exception):
    """The process that was asked ended, or said what nobody can read."""


class Busy(Exception):
    """Every process had something else to do for as long as an answer may take."""


class ProcessPool:
    """`count` processes of a module, each given the model's directory. One that overruns its time, or whose caller went away,
    is killed and replaced."""

    def __init__(self, module: str, model: Path, loads: str, count: int) -> None:
        self._command = (sys.executable, "-m", module, str(model))
        self._loads = loads  # what a process loads before it is ready, for people
        self._count = count
        self._processes: set[Process] = set()  # all that run, whoever has them
        self._idle: asyncio.Queue[Process] = asyncio.Queue(maxsize=count)
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """ModelError when what they load cannot be used."""
        started = await asyncio.gather(*(self._start() for _ in range(self._count)), return_exceptions=True)
        for process in started:
            if isinstance(process, Process):
                self._idle.put_nowait(process)
        for failure in started:
            if isinstance(failure, BaseException):
                await self.close()
                raise failure

    async def close(self) -> None:
        """Ends every process, also one that is asked something just now."""
        self._is_closed = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        for process in list(self._processes):
            await process.kill()

    async def ask(self, question: Answer, timeout_s: float) -> Answer:
        """The answer; TimeoutError, Died, or Busy."""
        process = await self._take(timeout_s)
        is_sound = False
        try:
            async with asyncio.timeout(timeout_s):
                answer = await process.ask(question)
            is_sound = True
        except TimeoutError:  # an OSError too
            raise
        except (OSError, EOFError, ValueError) as exc:
            raise Died from exc
        finally:
            if is_sound:
                self._idle.put_nowait(process)
            else:  # also when cancelled half way: the answer to come belongs to nobody
                self._replace(process)
        return answer

    async def _take(self, timeout_s: float) -> Process:
        """The next process that lives; one that died while it was idle did so of nobody's question."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    process = await self._idle.get()
                    if not process.is_dead:
                        return process
                    self._replace(process)
        except TimeoutError as exc:
            raise Busy from exc

    def _replace(self, process: Process) -> None:
        """Ends `process` and starts another, for as long as it takes."""
        if self._is_closed:
            return

        async def replace() -> None:
            await process.kill()
            self._processes.discard(process)
            while True:
                try:
                    self._idle.put_nowait(await self._start())
                except (ConfigError, OSError, ValueError):
                    log.exception("process does not start", loads=self._loads)
                    await asyncio.sleep(RESTART_S)
                else:
                    return

        task = asyncio.create_task(replace(), name="replace-process")
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _start(self) -> Process:
        started = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        process = Process(started)
        self._processes.add(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await process.read()
            if "refused" in answer:
                raise ModelError(str(answer["refused"]))
        except BaseException as exc:  # whatever it was, and whoever does not want it any more: no process stays behind
            await process.kill()
            self._processes.discard(process)
            if isinstance(exc, TimeoutError | EOFError):
                raise ModelError(f"{self._loads}: loading it does not end, or needs too much memory") from exc
            raise
        return process


class Process:
    """One of a pool; one question at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def is_dead(self) -> bool:
        """Asked of the kernel: the event loop hears of it later."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # and has been collected
            return True

    async def ask(self, question: Answer) -> Answer:
        stdin = self._process.stdin
        assert stdin is not None
        body = json.dumps(question).encode()
        stdin.write(struct.pack("<I", len(body)) + body)
        await stdin.drain()
        return await self.read()

    async def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def read(self) -> Answer:
        stdout = self._process.stdout
        assert stdout is not None
        (length,) = struct.unpack("<I", await stdout.readexactly(4))
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"answer of {length} bytes")
        return json.loads(await stdout.readexactly(length))  # type: ignore[no-any-return]
