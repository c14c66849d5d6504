"""W1, W2 and W3 on both cores, one worker that does everything: ours beside vLLM and OpenVINO GenAI, each through its own server."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.report import Row
from benchmarks.serve.answers import itl_p50_ms, itl_p99_ms, single_stream_rate, ttft_ms
from benchmarks.serve.comparisons import BEST, ITL_P50, ITL_P99, RATE, TTFT, Target, compare
from benchmarks.serve.contestants import Contestant, Lineup
from benchmarks.serve.entrants import OPENVINO, VLLM, add_openvino, add_ours, add_vllm
from benchmarks.serve.fleets import Cores, vocab_size
from benchmarks.serve.workloads import W1, W2, W3, Batch, one, together

W1_TARGETS = {OPENVINO: Target("at least 1.2x OpenVINO GenAI", 1.2), VLLM: Target("at least 1.8x vLLM", 1.8)}
W2_BOUNDS = {4: 1.3, 8: 1.5, 16: 1.7}  # times the best of them
W3_TARGETS = {VLLM: Target("at most 1.0x vLLM's", 1.0)}
VARIANT_TARGETS = {"--weights=int8": Target("at least 1.3x our own bf16", 1.3)}  # of W1's tokens/s


def both_cores(args: argparse.Namespace, lineup: Lineup) -> list[Row]:
    cpus, vocab = args.cpus, vocab_size(args.model)
    add_ours(lineup, args, Cores((), tuple(cpus)), cpus)
    for dtype in args.vllm_dtypes:
        add_vllm(lineup, cpus, dtype)
    add_openvino(lineup, cpus)
    measure = partial(lineup.measure, args.turns, args.warmup)
    singles = measure(lambda c, turn: one(c.endpoint, vocab, turn, W1))
    rows = compare(f"W1 {W1}", RATE, lineup.series(singles, single_stream_rate), W1_TARGETS, VARIANT_TARGETS)
    for metric, read in ((TTFT, ttft_ms), (ITL_P50, itl_p50_ms), (ITL_P99, itl_p99_ms)):
        rows += compare(f"W1 {W1}", metric, lineup.series(singles, read))
    for streams in args.streams:

        def take(contestant: Contestant, turn: int, streams: int = streams) -> Batch:
            return together(contestant.endpoint, vocab, 1000 * streams + turn, W2, streams)

        bound = W2_BOUNDS.get(streams)
        targets = {} if bound is None else {BEST: Target(f"at least {bound}x the best of them", bound)}
        series = lineup.series(measure(take), lambda batch: batch.tokens_per_s)
        rows += compare(f"W2 {W2}, {streams} streams", RATE, series, targets)
    prefills = measure(lambda c, turn: one(c.endpoint, vocab, 100 + turn, W3))
    return [*rows, *compare(f"W3 {W3}", TTFT, lineup.series(prefills, ttft_ms), W3_TARGETS)]
