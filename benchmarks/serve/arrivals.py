"""Requests at random times, split, ours alone: prompts that wait at once are computed one after the other, as workers on CPUs do, or fill
steps together, as most engines do (`--saturating-rows` as large as a step). Both fleets get the same arrivals, in turn."""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time

from benchmarks.predict import FIRST_ORDINARY_ID, MIX, Numbers, arrivals_at, served
from benchmarks.report import Row, half_spread
from benchmarks.serve.fleets import SPLIT, cores_of, fleet
from splitfire.cli.advise import stream
from splitfire.cli.client import Client

LOADS = (0.3, 0.5)  # of what the prefill worker could do; the rest of its core is router's and client's
NUM_REQUESTS = 60
SHARED = "--saturating-rows=65536"
ALONE, TOGETHER = "one after the other", "in shared steps"
METRICS = {"TTFT mean": "ttft_mean", "TTFT p50": "ttft_p50", "TTFT p90": "ttft_p90", "ITL mean": "itl_mean"}


def arrivals(args: argparse.Namespace) -> list[Row]:
    """Times of both, and how many times as long the other's are."""
    rows, cores = [], cores_of(SPLIT, args.cpus)
    with contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(stack.enter_context(fleet(args.model, cores, flags)).client())
            for name, flags in ((ALONE, args.flag), (TOGETHER, [*args.flag, SHARED]))
        }
        vocab_size = clients[ALONE].model().vocab_size
        seconds = statistics.median(_alone_s(client, vocab_size) for client in clients.values())
        for load in LOADS:
            trace = arrivals_at(clients[ALONE], load / seconds, 10 if args.quick else NUM_REQUESTS)
            taken: dict[str, list[Numbers]] = {name: [] for name in clients}
            for _ in range(args.turns):
                for name, client in clients.items():
                    taken[name].append(served(client, trace, vocab_size, time.monotonic_ns()))
            rows += _rows(f"load {load:g}", taken)
    return rows


def _alone_s(client: Client, vocab_size: int) -> float:
    """Computing a prompt of the mean length."""
    draw = random.Random(time.monotonic_ns())
    prompts = [[draw.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(MIX.num_prompt)] for _ in range(6)]
    return statistics.median([stream(client, prompt, 2).prefill_s for prompt in prompts][1:])


def _rows(case: str, taken: dict[str, list[Numbers]]) -> list[Row]:
    found = []
    for metric, field in METRICS.items():
        ours, theirs = ([1e3 * getattr(numbers, field) for numbers in taken[name]] for name in (ALONE, TOGETHER))
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        a, b = statistics.median(ours), statistics.median(theirs)
        found.append(Row(case, metric, "ms", a, b, TOGETHER, ratio, "", None, half_spread(ours)))
    return found
