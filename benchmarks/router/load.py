"""A process of clients: streams over several connections, closed loop (each asks again when it has its answer) or at given instants.
Event loop only. Instants are `time.perf_counter`'s, which all processes of a Linux host share.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from splitfire.v1 import inference_pb2 as pb

GENERATE = "/splitfire.v1.Inference/Generate"
Generate = grpc.aio.UnaryStreamMultiCallable[bytes, pb.GenerateResponse]
Call = grpc.aio.UnaryStreamCall[bytes, pb.GenerateResponse]
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
NUM_BODIES = 256
WORDS = tuple(
    f"{a}{b}{c}" for a in ("un", "re", "", "over") for b in ("turn", "load", "place", "mark") for c in ("", "ed", "ing", "er")
)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request is: so many bytes of text, or so many token ids, and so many tokens back."""

    text_bytes: int
    token_ids: int
    max_tokens: int
    timeout_s: float = 60.0

    def bodies(self, seed: int) -> list[bytes]:
        """Serialized requests, no two alike."""
        draw = random.Random(seed)
        return [self._body(draw).SerializeToString() for _ in range(NUM_BODIES)]

    def _body(self, draw: random.Random) -> pb.GenerateRequest:
        stopping = pb.StoppingParams(max_tokens=self.max_tokens, ignore_eos=True)
        if self.token_ids:
            return pb.GenerateRequest(prompt_token_ids=draw.choices(range(300, 4000), k=self.token_ids), stopping=stopping)
        return pb.GenerateRequest(text=text_of(draw, self.text_bytes), stopping=stopping)


def text_of(draw: random.Random, num_bytes: int) -> str:
    words = " ".join(draw.choice(WORDS) for _ in range(num_bytes // 3))
    return words[:num_bytes]


@dataclass(slots=True)
class Answer:
    """One request: when it was sent, each message's instant, tokens, how it ended."""

    sent: float
    at: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_messages: int = 0
    ended: float = 0.0
    error: str = ""  # reason, or the code's name

    @property
    def ttft_s(self) -> float:
        return self.at[0] - self.sent

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.at)]


class Clients:
    """The process's clients, as the benchmark orders them about."""

    def __init__(self) -> None:
        self._channels: list[grpc.aio.Channel] = []
        self._turn = 0

    async def connect(self, addresses: Sequence[str], num_channels: int) -> None:
        await self.disconnect()
        self._channels = [grpc.aio.insecure_channel(a, options=OPTIONS) for _ in range(num_channels) for a in addresses]
        await asyncio.wait_for(asyncio.gather(*(c.channel_ready() for c in self._channels)), 10)

    async def disconnect(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels = []

    async def closed(self, ask: Ask, streams: int, seconds: float, seed: int) -> list[Answer]:
        """`streams` at once, each asking again until the time is over; what has begun then ends."""
        bodies = itertools.cycle(ask.bodies(seed))
        until = time.perf_counter() + seconds
        answers: list[Answer] = []

        async def one() -> None:
            while time.perf_counter() < until:
                answers.append(await self._ask(next(bodies), ask.timeout_s))

        await asyncio.gather(*(one() for _ in range(streams)))
        return answers

    async def opened(self, ask: Ask, instants: Sequence[float], seed: int) -> list[Answer]:
        """One request at each instant (seconds from now), whether or not others have ended."""
        return await self._at(instants, itertools.cycle(ask.bodies(seed)), ask.timeout_s)

    async def played(self, bodies: Sequence[bytes], instants: Sequence[float], timeout_s: float) -> list[Answer]:
        """These requests at these instants."""
        return await self._at(instants, iter(bodies), timeout_s)

    async def cancelled(self, ask: Ask, count: int, within_s: float, after_s: float, seed: int) -> float:
        """Starts `count` streams, and after a while cancels all of them within a time; how long that took."""
        bodies = itertools.cycle(ask.bodies(seed))
        calls = [self._generate(next(bodies), ask.timeout_s) for _ in range(count)]
        begun = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        if errors := Counter(str(first) for first in begun if isinstance(first, BaseException)):
            raise RuntimeError(f"{errors.total()} of {count} requests did not begin: {errors.most_common(2)}")
        await asyncio.sleep(after_s)
        began = time.perf_counter()
        for i, call in enumerate(calls):
            call.cancel()
            if i % 20 == 19:
                await asyncio.sleep(max(0.0, began + within_s * i / count - time.perf_counter()))
        return time.perf_counter() - began

    async def _at(self, instants: Sequence[float], bodies: Iterator[bytes], timeout_s: float) -> list[Answer]:
        began = time.perf_counter()
        tasks = []
        for instant, body in zip(instants, bodies, strict=False):
            delay = began + instant - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(self._ask(body, timeout_s)))
        return list(await asyncio.gather(*tasks))

    def _generate(self, body: bytes, timeout_s: float) -> Call:
        """On the next connection in turn."""
        self._turn += 1
        channel = self._channels[self._turn % len(self._channels)]
        generate: Generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        return generate(body, timeout=timeout_s)

    async def _ask(self, body: bytes, timeout_s: float) -> Answer:
        answer = Answer(time.perf_counter())
        call = self._generate(body, timeout_s)
        try:
            async for response in call:
                if response.token_ids:
                    answer.at.append(time.perf_counter())
                    answer.num_messages += 1
                    answer.num_tokens += len(response.token_ids)
        except grpc.aio.AioRpcError as exc:
            answer.error = _reason(exc)
        answer.ended = time.perf_counter()
        return answer


def errors_of(answers: Sequence[Answer]) -> Counter[str]:
    return Counter(a.error for a in answers if a.error)


def _reason(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return str(info.reason)
    return error.code().name
