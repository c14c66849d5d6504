"""W8: the routing workload of our benchmarks, generated. Pure.

400 requests in 11 s for 4 engines: 260 of 40 sessions, 60 on 3 hot prefixes, 80 alone. The lengths that its definition leaves open are
such that one cache of all four sizes finds 0.68 of the tokens, and round robin over four caches about 0.47.
"""

from __future__ import annotations

from random import Random

from router.costs import PromptCost
from router.simulation.engine import Engine, StepCost
from router.simulation.text import Text
from splitfire.core.workload_trace import Arrival, Trace

BLOCK, CACHE_BLOCKS = 16, 1250
SECONDS = 11.0
NUM_SESSIONS, NUM_TURNS, MOST_TURNS = 40, 260, 8
NUM_HOT, NUM_UNIQUE = 60, 80
SYSTEM_TOKENS = (256, 448, 640, 832, 1024)
HOT_TOKENS = (1024, 1536, 2048)
OUTPUT = (40, 120)
THINK_S = (0.3, 0.9)  # from one turn to the next


def engine(max_cached: int = CACHE_BLOCKS) -> Engine:
    """First in, first out; a token every 2 ms, whatever else happens; the cache apart from what runs."""
    return Engine(
        prompt=PromptCost(base_s=0.002, token_s=6e-5),
        step=StepCost(0.002),
        num_blocks=100_000,
        block_size=BLOCK,
        chunk_tokens=256,
        block_bytes=BLOCK * 23_040,
        max_cached=max_cached,
        is_fifo=True,
        shares_steps=False,
    )


def w8(seed: int) -> Trace:
    random, text = Random(seed), Text(BLOCK)
    arrivals = _sessions(random, text)
    hot = [text.new(length) for length in HOT_TOKENS]
    for _ in range(NUM_HOT):
        prompt = text.more(random.choice(hot), random.randint(50, 150))
        arrivals.append(text.arrival(random.uniform(0, SECONDS), prompt, random.randint(*OUTPUT)))
    for _ in range(NUM_UNIQUE):
        arrivals.append(text.arrival(random.uniform(0, SECONDS), text.new(random.randint(1000, 2000)), random.randint(*OUTPUT)))
    return Trace(f"w8-{seed}", BLOCK, sorted(arrivals, key=lambda arrival: arrival.at_s))


def _sessions(random: Random, text: Text) -> list[Arrival]:
    """Each turn repeats all before it."""
    turns = [random.randint(1, MOST_TURNS) for _ in range(NUM_SESSIONS)]
    while sum(turns) != NUM_TURNS:
        one = random.randrange(NUM_SESSIONS)
        turns[one] = min(MOST_TURNS, max(1, turns[one] + (1 if sum(turns) < NUM_TURNS else -1)))
    systems = [text.new(length) for length in random.sample(SYSTEM_TOKENS, len(SYSTEM_TOKENS))]
    weights = [1 / rank for rank in range(1, len(systems) + 1)]
    arrivals = []
    for count in turns:
        prompt = random.choices(systems, weights)[0]
        at = random.uniform(0, SECONDS - sum(THINK_S) / 2 * (count - 1))
        for _ in range(count):
            prompt = text.more(prompt, random.randint(50, 250))
            num_output = random.randint(*OUTPUT)
            arrivals.append(text.arrival(at, prompt, num_output))
            prompt = text.more(prompt, num_output)
            at += random.uniform(*THINK_S)
    return arrivals
