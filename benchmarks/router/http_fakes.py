"""A process full of fake HTTP engines, for routers that relay HTTP: as fast and with the same cache as the fake workers. Event loop only.

POST /v1/completions with `stream`, as OpenAI has it; a token of a prompt is a word. Any other path says that all is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from hashlib import blake2b

from benchmarks.router.engine import PrefixCache, Speed

MODEL = "benchmarked"
_INFO = {"status": "ok", "model_path": MODEL, "data": [{"id": MODEL, "object": "model"}], "object": "list", "version": "0"}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class HttpEngine:
    """One of them: prompts one after another, sequences step by step, each by itself."""

    def __init__(self, speed: Speed, block_size: int) -> None:
        self.prompt_tokens = self.cached_tokens = 0
        self._speed = speed
        self._block_size = block_size
        self._cache = PrefixCache(speed.cached_blocks)
        self._free_at = 0.0
        self._turn = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the router went away
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                first, *fields = head.decode().split("\r\n")
                length = next((int(f.split(":")[1]) for f in fields if f.lower().startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                if "/v1/completions" in first:
                    await self._answer(json.loads(body), writer)
                else:
                    info = json.dumps(_INFO).encode()
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(info) + info
                    )
        writer.close()

    async def _answer(self, asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        max_tokens, prompt = asked["max_tokens"], asked["prompt"]
        assert isinstance(max_tokens, int)
        assert isinstance(prompt, str)
        await self._prefill(prompt)
        writer.write(_HEAD + _chunk(1, "length" if max_tokens == 1 else None))
        sent, next_at = 1, time.monotonic()
        while sent < max_tokens:
            next_at += self._speed.step_s
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            if writer.is_closing():
                raise ConnectionResetError
            count = min(self._speed.tokens_per_step, max_tokens - sent)
            sent += count
            writer.write(_chunk(count, "length" if sent == max_tokens else None))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def _prefill(self, prompt: str) -> None:
        if self._speed.prefill_s(1) == 0.0:
            return
        words = prompt.split()
        names = _names(words, self._block_size)
        async with self._turn:  # first in, first out
            num_cached = min(self._cache.depth(names), (len(words) - 1) // self._block_size) * self._block_size
            self._free_at = max(self._free_at, time.monotonic()) + self._speed.prefill_s(len(words) - num_cached)
            await asyncio.sleep(self._free_at - time.monotonic())
            self._cache.add(names)
            self.prompt_tokens += len(words)
            self.cached_tokens += num_cached


class HttpEngines:
    """The process's engines, as the benchmark orders them about."""

    def __init__(self) -> None:
        self._engines: list[HttpEngine] = []
        self._servers: list[asyncio.Server] = []

    async def serve(self, ports: Sequence[int], speed: Speed, block_size: int) -> None:
        """Fresh ones at these ports, in place of those before."""
        for server in self._servers:
            server.close()
        self._engines = [HttpEngine(speed, block_size) for _ in ports]
        self._servers = [
            await asyncio.start_server(engine.serve, "127.0.0.1", port, limit=1 << 20, reuse_port=True)
            for engine, port in zip(self._engines, ports, strict=True)
        ]

    def hit_rate(self) -> float:
        return sum(e.cached_tokens for e in self._engines) / max(1, sum(e.prompt_tokens for e in self._engines))


def _names(words: Sequence[str], block_size: int) -> tuple[int, ...]:
    """Chained, as block hashes are."""
    names, parent = [], b""
    for begin in range(0, len(words) - block_size + 1, block_size):
        parent = blake2b(parent + " ".join(words[begin : begin + block_size]).encode(), digest_size=8).digest()
        names.append(int.from_bytes(parent, "little"))
    return tuple(names)


def _chunk(num_tokens: int, finish_reason: str | None) -> bytes:
    """One server-sent event."""
    choice = {"index": 0, "text": " word" * num_tokens, "logprobs": None, "finish_reason": finish_reason}
    event = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL, "choices": [choice]}
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n" % len(data) + data + b"\r\n"
