"""Traces like the two that Mooncake published, generated: as many requests, tokens and repeated tokens in an hour. Pure.

Qin et al., Mooncake, FAST 2025: `conversation` has 12031 requests in an hour, 12035 tokens in and 343 out at the mean, of which a cache
without bounds finds 40 %; `toolagent` 23608, 8596, 182 and 59 %. In the published `conversation` all prompts begin with the same block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from router.costs import PromptCost
from router.simulation.engine import Engine, StepCost
from router.simulation.pool import CachePool
from router.simulation.text import Text
from splitfire.core.workload_trace import MOONCAKE_BLOCK, Arrival, Trace

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal number of tokens, at least 1."""

    median: float
    sigma: float
    most: int

    def draw(self, random: Random) -> int:
        return max(1, min(self.most, round(random.lognormvariate(0.0, self.sigma) * self.median)))


@dataclass(frozen=True, slots=True)
class Chat:
    """Sessions that begin at random times. A turn repeats all before it, and one more follows with probability `goes_on`."""

    name: str
    num_requests: int  # in an hour
    openings: Sequence[int]  # tokens of the prompts that sessions begin with; the n-th is n times as rare as the first
    first: Lengths
    more: Lengths  # that a further turn adds, beside the answer before it
    output: Lengths
    goes_on: float
    pause_s: float  # median


CONVERSATION = Chat(
    "conversation", 12031, (512,), Lengths(5900, 1.0, 100_000), Lengths(1500, 0.9, 30_000), Lengths(245, 0.85, 2000), 0.38, 40.0
)
TOOLS = tuple(1000 + 700 * (number * 7 % 11) for number in range(40))
TOOLAGENT = Chat(
    "toolagent", 23608, TOOLS, Lengths(2350, 1.0, 60_000), Lengths(1000, 0.9, 20_000), Lengths(120, 0.9, 2000), 0.32, 10.0
)


def generate(chat: Chat, seed: int, num_requests: int) -> Trace:
    random, text = Random(seed), Text(MOONCAKE_BLOCK)
    openings = [text.new(length) for length in chat.openings]
    weights = [1 / rank for rank in range(1, len(openings) + 1)]
    seconds = HOUR * num_requests / chat.num_requests
    arrivals: list[Arrival] = []
    while len(arrivals) < num_requests:
        at = random.uniform(0, seconds)
        prompt = text.more(random.choices(openings, weights)[0], chat.first.draw(random))
        while at < seconds:
            num_output = chat.output.draw(random)
            arrivals.append(text.arrival(at, prompt, num_output))
            if random.random() >= chat.goes_on:
                break
            prompt = text.more(prompt, num_output + chat.more.draw(random))
            at += random.lognormvariate(0.0, 0.7) * chat.pause_s
    return Trace(f"{chat.name}-{seed}", MOONCAKE_BLOCK, sorted(arrivals, key=lambda arrival: arrival.at_s))


def large_engine(max_cached: int) -> Engine:
    """A worker with a model of 70 B parameters on eight GPUs: 5000 tokens a second, 30 ms a step."""
    return Engine(
        prompt=PromptCost(base_s=0.02, token_s=2e-4, pair_s=1e-8),
        step=StepCost(0.03, 1e-4, 2e-8),
        num_blocks=1_000_000,
        block_size=MOONCAKE_BLOCK,
        chunk_tokens=1024,
        block_bytes=MOONCAKE_BLOCK * 327_680,
        bytes_per_s=5e10,
        max_cached=max_cached,
        shares_steps=False,
    )


def at_load(trace: Trace, engine: Engine, num_workers: int, load: float) -> Trace:
    """So fast that what one cache of all sizes does not find keeps the workers busy for this share of their time."""
    assert engine.max_cached is not None
    pool = CachePool(engine.num_blocks * num_workers, engine.max_cached * num_workers)
    busy_s = 0.0
    for arrival in trace.arrivals:
        lease = pool.admit(arrival.names, len(arrival.names))
        assert lease is not None
        cached = min(len(lease.names) * trace.block_size, arrival.num_tokens - 1)
        busy_s += engine.prompt.seconds(arrival.num_tokens, cached)
        pool.commit(lease, arrival.names[len(lease.names) :])
        pool.release(lease)
        pool.take_changes()
    return trace.at_rate(load * num_workers * trace.arrivals[-1].at_s / busy_s)
