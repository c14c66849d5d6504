"""Text at the router's edges: into token ids through a pool of killable processes, and back as the client reads.

Tokenizing and templates run elsewhere (text_worker.py) because a prompt can make them arbitrarily slow; decoding ids is
bounded work and happens here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

import structlog
from tokenizers import Tokenizer

from splitfire.core import limits
from splitfire.core.errors import ConfigError, Exhausted, Internal, InvalidInput, ModelError
from splitfire.core.model_dir import ModelDir
from splitfire.core.validation import ChatTurn

log = structlog.get_logger("router")
NUM_PROCESSES = 2
START_TIMEOUT_S = 30.0
RESTART_S = 1.0  # between tries to start one
MAX_ANSWER_BYTES = 64 << 20
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes in UTF-8; a token has at least one
MAX_UNFINISHED = 8  # ids that may wait for the rest of a character


class TextPool:
    """Tokenizes with a time limit. A process that overruns it, or whose caller went away, is killed and replaced."""

    def __init__(self, model: ModelDir) -> None:
        self._model = model
        self._processes: set[_Process] = set()  # all that run, whoever has them
        self._idle: asyncio.Queue[_Process] = asyncio.Queue(maxsize=NUM_PROCESSES)
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """ModelError when the tokenizer or the chat template cannot be used."""
        started = await asyncio.gather(*(_Process.start(self._model) for _ in range(NUM_PROCESSES)), return_exceptions=True)
        for process in started:
            if isinstance(process, _Process):
                self._add(process)
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
        for process in self._processes:
            await process.kill()

    async def encode(self, text: str) -> list[int]:
        return await self._ask({"text": text}, "text")

    async def encode_continuation(self, text: str, field: str) -> list[int]:
        """Text that goes on where other text ends: no special tokens before it."""
        return await self._ask({"continuation": text}, field)

    async def encode_chat(self, messages: Sequence[ChatTurn]) -> list[int]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return await self._ask({"messages": turns}, "messages")

    async def _ask(self, question: dict[str, Any], field: str) -> list[int]:
        process = await self._take()
        is_sound = False
        try:
            async with asyncio.timeout(limits.TOKENIZE_TIMEOUT_S):
                answer = await process.ask(question)
            is_sound = True
        except TimeoutError as exc:
            message = f"could not be tokenized within {limits.TOKENIZE_TIMEOUT_S:g} s; shorten it"
            raise InvalidInput(field, message, reason="tokenization_timeout") from exc
        except (OSError, EOFError, ValueError) as exc:
            raise InvalidInput(
                field, "cannot be tokenized: its tokenizer process died; shorten it", reason="tokenization_failed"
            ) from exc
        finally:
            if is_sound:
                self._idle.put_nowait(process)
            else:  # also when cancelled half way: the answer to come belongs to nobody
                self._replace(process)
        if "bad" in answer:
            raise InvalidInput(field, str(answer["bad"]))
        if "failed" in answer:
            raise Internal(f"tokenizer failed: {answer['failed']}")
        return list(answer["ids"])

    async def _take(self) -> _Process:
        """The next process that lives; one that died while it was idle did so of nobody's question."""
        try:
            async with asyncio.timeout(limits.TOKENIZE_TIMEOUT_S):
                while True:
                    process = await self._idle.get()
                    if not process.is_dead:
                        return process
                    self._replace(process)
        except TimeoutError as exc:
            raise Exhausted("all tokenizer processes are busy", reason="queue_full", retry_after_s=1.0) from exc

    def _replace(self, process: _Process) -> None:
        """Ends `process` and starts another, for as long as it takes."""
        if self._is_closed:
            return

        async def replace() -> None:
            await process.kill()
            self._processes.discard(process)
            while True:
                try:
                    self._add(await _Process.start(self._model))
                except (ConfigError, OSError, ValueError):
                    log.exception("tokenizer process does not start")
                    await asyncio.sleep(RESTART_S)
                else:
                    return

        task = asyncio.create_task(replace(), name="replace-text-process")
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    def _add(self, process: _Process) -> None:
        self._processes.add(process)
        self._idle.put_nowait(process)


class _Process:
    """One text_worker; one question at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @staticmethod
    async def start(model: ModelDir) -> _Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router.text_worker", str(model.path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        worker = _Process(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await worker._read()
        except (TimeoutError, EOFError) as exc:
            await worker.kill()
            raise ModelError("tokenizer.json or chat_template: loading it does not end, or needs too much memory") from exc
        except BaseException:  # whatever it was, and whoever does not want it any more: no process stays behind
            await worker.kill()
            raise
        if "refused" in answer:
            await worker.kill()
            raise ModelError(str(answer["refused"]))
        return worker

    @property
    def is_dead(self) -> bool:
        """Asked of the kernel: the event loop hears of it later."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # and has been collected
            return True

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        body = json.dumps(question).encode()
        stdin.write(struct.pack("<I", len(body)) + body)
        await stdin.drain()
        return await self._read()

    async def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def _read(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        (length,) = struct.unpack("<I", await stdout.readexactly(4))
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"answer of {length} bytes")
        return json.loads(await stdout.readexactly(length))  # type: ignore[no-any-return]


class TextStream:
    """Token ids of one choice to text, whole characters only, ending before the first stop string.

    `push` returns the text that is certain now; a tail that may be the beginning of a character or of a stop string
    waits. After a stop string matched, `is_stopped` and nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._num_settled = 0  # ids before these are decoded only as context
        self._settled = ""  # text of the context
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        text, end = self._decode(self._ids), len(self._ids)
        if text.endswith(REPLACEMENT):  # an unfinished character, or bytes that will never be one
            if end - self._num_settled <= MAX_UNFINISHED:
                return ""
            end -= LONGEST_CHARACTER - 1
            whole, text = text, self._decode(self._ids[:end])
            if not whole.startswith(text) and end - self._num_settled <= 2 * MAX_UNFINISHED:
                return ""
        return self._match(self._settle(text, end))

    def flush(self) -> str:
        """The end: what was held back comes out, an unfinished character as U+FFFD."""
        if self.is_stopped:
            return ""
        text = self._match(self._settle(self._decode(self._ids), len(self._ids)))
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _settle(self, text: str, end: int) -> str:
        """What `text`, of the ids before `end`, adds; keeps the last ids, enough for tokenizers that look at their neighbour."""
        new = text[len(self._settled) :]
        if new or end - self._num_settled > MAX_UNFINISHED:  # special tokens have no text
            self._ids = self._ids[self._num_settled :]
            self._num_settled = end - self._num_settled
            self._settled = self._decode(self._ids[: self._num_settled])
        return new

    def _match(self, text: str) -> str:
        if not self._stops:
            return text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
