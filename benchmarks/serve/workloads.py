"""W1 to W5: what is asked of a server, and what comes out. Prompts are token ids drawn from a seed, so everybody gets the same.

W1  512 / 128, one stream             W4  64 / 256 on four steady streams while long prompts arrive
W2  256 / 128, several streams        W5  32 requests that share 1024 tokens and have 64 of their own / 32, four at a time
W3  2048 / 1, one stream
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.serve.answers import Answer, gaps
from benchmarks.serve.endpoints import Endpoint, ask, random_prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of one request."""

    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.output}"


W1, W2, W3 = Shape(512, 128), Shape(256, 128), Shape(2048, 1)
STEADY, NUM_STEADY = Shape(64, 256), 4
# More than one token of answer, or a split server would have nothing to hand over.
LONG = Shape(4096, 16)
FIRST_LONG_S = 1.0
STEADY_WAIT_S = 120.0  # for the first token of each steady stream
NOTHING_S = 15.0  # how long the steady streams are watched with nothing arriving
W5, NUM_SHARED, NUM_SHARING, SHARING_AT_ONCE = Shape(64, 32), 1024, 32, 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that were asked together."""

    answers: tuple[Answer, ...]
    duration_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(a.token_times) for a in self.answers) / self.duration_s

    @property
    def num_cached(self) -> int:
        return sum(a.num_cached for a in self.answers)


@dataclass(frozen=True, slots=True)
class Interference:
    """W4: gaps of the steady streams from the first long prompt's arrival on, and how long each long prompt waited."""

    itl_s: tuple[float, ...]
    long_ttft_s: tuple[float, ...]


def one(endpoint: Endpoint, vocab: int, seed: int, shape: Shape) -> Answer:
    return ask(endpoint, random_prompt(random.Random(seed), shape.prompt, vocab), shape.output)


def together(endpoint: Endpoint, vocab: int, seed: int, shape: Shape, streams: int) -> Batch:
    """All streams start at once."""
    draw = random.Random(seed)
    return _ask_all(endpoint, [random_prompt(draw, shape.prompt, vocab) for _ in range(streams)], shape.output, streams)


def sharing(endpoint: Endpoint, vocab: int, seed: int) -> Batch:
    """W5. The shared part is another one for each seed: nothing of an earlier turn helps."""
    draw = random.Random(seed)
    shared = random_prompt(draw, NUM_SHARED, vocab)
    prompts = [[*shared, *random_prompt(draw, W5.prompt, vocab)] for _ in range(NUM_SHARING)]
    return _ask_all(endpoint, prompts, W5.output, SHARING_AT_ONCE)


def _ask_all(endpoint: Endpoint, prompts: Sequence[Sequence[int]], output: int, at_once: int) -> Batch:
    with ThreadPoolExecutor(at_once) as pool:
        began = time.perf_counter()
        answers = tuple(pool.map(lambda prompt: ask(endpoint, prompt, output), prompts))
        return Batch(answers, time.perf_counter() - began)


def steady_and_long(endpoint: Endpoint, vocab: int, seed: str, num_long: int, every_s: float) -> Interference:
    """W4: `num_long` prompts, one every `every_s`, the first FIRST_LONG_S after every steady stream has a token; the steady streams start
    again until the last of them has ended. With none the steady streams are watched for NOTHING_S."""
    draw = random.Random(seed)
    prompts = [random_prompt(draw, LONG.prompt, vocab) for _ in range(num_long)]
    has_ended = threading.Event()
    has_begun = [threading.Event() for _ in range(NUM_STEADY)]
    with ThreadPoolExecutor(NUM_STEADY + max(1, num_long)) as pool:
        steady = [
            pool.submit(_steady, endpoint, vocab, random.Random(f"{seed} {i}"), e, has_ended) for i, e in enumerate(has_begun)
        ]
        try:
            if not all(e.wait(STEADY_WAIT_S) for e in has_begun):
                raise RuntimeError(f"a steady stream has no token after {STEADY_WAIT_S:g} s")
            first = time.perf_counter() + FIRST_LONG_S
            waiting = []
            for i, prompt in enumerate(prompts):
                _sleep_until(first + i * every_s)
                waiting.append(pool.submit(ask, endpoint, prompt, LONG.output))
            long = [w.result() for w in waiting]
            if not prompts:
                _sleep_until(first + NOTHING_S)
        finally:
            has_ended.set()
        requests = [times for stream in steady for times in stream.result()]
    found = [g for times in requests for g in gaps([t for t in times if t >= first])]
    return Interference(tuple(found), tuple(a.ttft_s for a in long))


def _steady(
    endpoint: Endpoint, vocab: int, draw: random.Random, has_begun: threading.Event, has_ended: threading.Event
) -> list[list[float]]:
    """Instants of the tokens of each request, on the clock itself; the last request is left in the middle."""
    requests: list[list[float]] = []
    while not has_ended.is_set():
        times: list[float] = []
        requests.append(times)
        with contextlib.closing(endpoint.stream(random_prompt(draw, STEADY.prompt, vocab), STEADY.output)) as stream:
            for piece in stream:
                times += [time.perf_counter()] * piece.num_tokens
                has_begun.set()
                if has_ended.is_set():
                    break
    return requests


def _sleep_until(instant: float) -> None:
    time.sleep(max(0.0, instant - time.perf_counter()))
