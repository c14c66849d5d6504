"""W1 and W2 with prefill on one core and decode on the other: ours beside vLLM's own split, and beside ours on one core alone.

The client and the router share prefill's core in all of them: decode's core is decode's alone.
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.report import Row
from benchmarks.serve.answers import itl_p50_ms, itl_p99_ms, single_stream_rate, ttft_ms
from benchmarks.serve.comparisons import ITL_P50, ITL_P99, RATE, TTFT, Target, compare
from benchmarks.serve.contestants import OURS, Lineup
from benchmarks.serve.entrants import OURS_ONE_CORE, VLLM_SPLIT, add_vllm_split
from benchmarks.serve.fleets import Cores, vocab_size
from benchmarks.serve.workloads import W1, W2, one, together

STREAMS = 4
RATE_TARGETS = {VLLM_SPLIT: Target("at least 3x vLLM's own split", 3.0)}
AT_MOST = 1.15  # of our own value on one core
ONE_CORE_TARGETS = {OURS_ONE_CORE: Target("at most 1.15x our own one-core aggregated", 1 / AT_MOST)}


def one_core_each(args: argparse.Namespace, lineup: Lineup) -> list[Row]:
    (first, second), vocab = args.cpus[:2], vocab_size(args.model)
    lineup.ours(f"{OURS} split", Cores((first,), (second,)), args.flag, [first])
    lineup.ours(f"{OURS} aggregated", Cores((), (second,)), args.flag, [first], family=OURS_ONE_CORE)
    for dtype in args.vllm_dtypes:
        add_vllm_split(lineup, [first], [second], dtype)
    measure = partial(lineup.measure, args.turns, args.warmup)
    singles = measure(lambda c, turn: one(c.endpoint, vocab, turn, W1))
    rows = compare(f"W1 {W1}", RATE, lineup.series(singles, single_stream_rate), RATE_TARGETS)
    for metric, read, targets in (
        (TTFT, ttft_ms, ONE_CORE_TARGETS),
        (ITL_P50, itl_p50_ms, ONE_CORE_TARGETS),
        (ITL_P99, itl_p99_ms, {}),
    ):
        rows += compare(f"W1 {W1}", metric, lineup.series(singles, read), targets)
    batches = measure(lambda c, turn: together(c.endpoint, vocab, 4000 + turn, W2, STREAMS))
    return [*rows, *compare(f"W2 {W2}, {STREAMS} streams", RATE, lineup.series(batches, lambda b: b.tokens_per_s), RATE_TARGETS)]
