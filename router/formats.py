"""Response formats become grammars: in killable processes, each format once. Event loop only.

The processes are started by the first request that has a format; a fleet that never sees one pays nothing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import structlog

from router.processes import Busy, Died, ProcessPool
from splitfire.core import limits
from splitfire.core.errors import Exhausted, InvalidInput, ModelError, Unsupported, one_line
from splitfire.core.model_dir import ModelDir
from splitfire.core.response_format import OutputGrammar, ResponseFormat

log = structlog.get_logger("router")
NUM_PROCESSES = 2
PER_ENTRY_BYTES = 512  # of the cache, beside its texts


class FormatPool:
    """Remembers what it made, least recently used last, in FORMAT_CACHE_BYTES."""

    def __init__(self, model: ModelDir) -> None:
        self._pool = ProcessPool("router.format_worker", model.path, "tokenizer.json", NUM_PROCESSES)
        self._started: asyncio.Task[None] | None = None
        self._made: OrderedDict[ResponseFormat, OutputGrammar] = OrderedDict()
        self._num_bytes = 0

    async def close(self) -> None:
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        await self._pool.close()

    async def compile(self, asked: ResponseFormat) -> OutputGrammar:
        """InvalidInput when no output can be held to it, or finding out takes too long."""
        if asked in self._made:
            self._made.move_to_end(asked)
            return self._made[asked]
        await self._start()
        grammar = OutputGrammar(asked.kind, await self._ask(asked))
        self._remember(asked, grammar)
        return grammar

    async def _ask(self, asked: ResponseFormat) -> str:
        try:
            answer = await self._pool.ask({"kind": asked.kind, "source": asked.source}, limits.FORMAT_TIMEOUT_S)
        except TimeoutError as exc:
            message = f"was not understood within {limits.FORMAT_TIMEOUT_S:g} s; make it simpler"
            raise InvalidInput(asked.field, message, reason="response_format_timeout") from exc
        except Died as exc:
            message = "takes too much memory, or is nested too deeply; make it simpler"
            raise InvalidInput(asked.field, message, reason="response_format_too_complex") from exc
        except Busy as exc:
            raise Exhausted("all processes for response formats are busy", reason="queue_full", retry_after_s=1.0) from exc
        if "bad" in answer:
            raise InvalidInput(asked.field, str(answer["bad"]))
        return str(answer["text"])

    async def _start(self) -> None:
        """Once, for whoever comes first; those who come meanwhile wait with him. Tried again after it failed."""
        if self._started is None or (self._started.done() and self._started.exception() is not None):
            self._started = asyncio.create_task(self._pool.start(), name="start-format-pool")
        try:
            await asyncio.shield(self._started)
        except ModelError as exc:
            log.warning("response formats cannot be used", reason=str(exc))
            raise Unsupported("response_format", f"this model's output cannot be constrained: {one_line(str(exc))}") from exc

    def _remember(self, asked: ResponseFormat, grammar: OutputGrammar) -> None:
        if asked in self._made:  # somebody asked for the same meanwhile
            return
        self._made[asked] = grammar
        self._num_bytes += _size_of(asked, grammar)
        while self._num_bytes > limits.FORMAT_CACHE_BYTES:
            self._num_bytes -= _size_of(*self._made.popitem(last=False))


def _size_of(asked: ResponseFormat, grammar: OutputGrammar) -> int:
    return 4 * (len(asked.source) + len(grammar.text)) + PER_ENTRY_BYTES  # a character takes at most 4 bytes
