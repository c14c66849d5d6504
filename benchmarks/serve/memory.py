"""Whether memory stays what it is: resident bytes of every process of a fleet while 10 000 requests go through it."""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor

import psutil

from benchmarks.report import Row
from benchmarks.serve.endpoints import GrpcEndpoint, ask, random_prompt
from benchmarks.serve.fleets import SPLIT, cores_of, fleet, vocab_size

NUM_REQUESTS, AT_ONCE = 10_000, 8
WARM = 0.2  # of the requests: caches fill, allocators find their size
MAX_GROWTH_MB = 8.0  # from then on
PROMPT_TOKENS = (4, 96)  # lengths differ, so that blocks come and go in every order


def memory(args: argparse.Namespace) -> list[Row]:
    """A split fleet; some requests are left in the middle."""
    num_requests = NUM_REQUESTS // 20 if args.quick else NUM_REQUESTS
    num_warm = int(num_requests * WARM)
    with fleet(args.model, cores_of(SPLIT, args.cpus), args.flag) as running:
        endpoint, vocab = GrpcEndpoint(running.address), vocab_size(args.model)
        processes = {c.name: psutil.Process(c.process.pid) for c in running.children if c.process is not None}
        _ask_many(endpoint, vocab, 0, num_warm)
        before = {name: p.memory_info().rss for name, p in processes.items()}
        _ask_many(endpoint, vocab, num_warm, num_requests)
        after = {name: p.memory_info().rss for name, p in processes.items()}
    return [_row(f"requests {num_warm} to {num_requests}, {name}", before[name], after[name]) for name in processes]


def _ask_many(endpoint: GrpcEndpoint, vocab: int, begin: int, end: int) -> None:
    def one(seed: int) -> None:
        draw = random.Random(seed)
        prompt, output = random_prompt(draw, draw.randrange(*PROMPT_TOKENS), vocab), draw.randrange(1, 8)
        if seed % 10:
            ask(endpoint, prompt, output)
        else:
            stream = endpoint.stream(prompt, 64)
            next(stream)
            stream.close()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(begin, end)))


def _row(case: str, before: int, after: int) -> Row:
    growth = (after - before) / 1e6
    words = f"at most {MAX_GROWTH_MB:g} MB more"
    return Row(case, "resident memory, growth", "MB", growth, before / 1e6, "MB before", None, words, growth <= MAX_GROWTH_MB, 0.0)
