"""A process of HTTP clients, for routers that relay HTTP: the same loops and the same numbers as the gRPC clients of load.py. Event
loop only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterable, Sequence

from benchmarks.router.http_fakes import MODEL
from benchmarks.router.load import NUM_BODIES, Answer, Ask, text_of

TIMEOUT_S = 60.0


class HttpClients:
    """The process's clients, as the benchmark orders them about. Connections are kept open and used again."""

    def __init__(self) -> None:
        self._port, self._model = 0, MODEL
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def connect(self, port: int, model: str = MODEL) -> None:
        for _, writer in self._idle:
            writer.close()
        self._port, self._model, self._idle = port, model, []

    async def closed(self, ask: Ask, streams: int, seconds: float, seed: int) -> list[Answer]:
        draw = random.Random(seed)
        bodies = itertools.cycle(
            [completion(text_of(draw, ask.text_bytes), ask.max_tokens, self._model) for _ in range(NUM_BODIES)]
        )
        until = time.perf_counter() + seconds
        answers: list[Answer] = []

        async def one() -> None:
            while time.perf_counter() < until:
                answers.append(await self._ask(next(bodies)))

        await asyncio.gather(*(one() for _ in range(streams)))
        return answers

    async def played(self, bodies: Iterable[bytes], instants: Sequence[float], _timeout_s: float) -> list[Answer]:
        began = time.perf_counter()
        tasks = []
        for instant, body in zip(instants, bodies, strict=True):
            await asyncio.sleep(max(0.0, began + instant - time.perf_counter()))
            tasks.append(asyncio.create_task(self._ask(body)))
        return list(await asyncio.gather(*tasks))

    async def _ask(self, body: bytes) -> Answer:
        answer = Answer(time.perf_counter())
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async with asyncio.timeout(TIMEOUT_S):
            status = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in status.split(b"\r\n")[0] + b" ":
                answer.error = status.split(b"\r\n")[0].decode()
                writer.close()
                return answer
            await _read_events(reader, answer)
        self._idle.append((reader, writer))
        answer.ended = time.perf_counter()
        return answer


def completion(prompt: str, max_tokens: int, model: str = MODEL) -> bytes:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    return json.dumps(body).encode()


async def _read_events(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Chunk by chunk; a chunk may hold several events, and an event of ours is never cut."""
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size + 2)
        events = data.count(b'"text": "') + data.count(b'"text":"')
        if events:
            answer.at.append(time.perf_counter())
            answer.num_messages += events
            answer.num_tokens += data.count(b" word")
    await reader.readline()
