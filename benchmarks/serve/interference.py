"""W4, what splitting is for: four streams decode while prompts of 4096 tokens arrive.

Ours split, one core for prefill (client and router on it too) and one for decode; beside it ours on both cores, vLLM on both
cores with its own chunk size and with others, and vLLM split. Long prompts arrive every 2 s, every 5 s, and not at all.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from benchmarks.report import Row
from benchmarks.serve.answers import percentile
from benchmarks.serve.comparisons import ITL_P50, ITL_P99, Metric, Series, Target, alone, compare, row
from benchmarks.serve.contestants import OURS, Contestant, Lineup
from benchmarks.serve.entrants import OURS_AGGREGATED, VLLM, add_vllm, add_vllm_split
from benchmarks.serve.fleets import Cores, vocab_size
from benchmarks.serve.workloads import LONG, NUM_STEADY, STEADY, Interference, steady_and_long

NUM_LONG = 8
EVERY_S = (2.0, 5.0)
MAX_P99_MS = 30.0
OWN_TARGET = Target("at most 1.5x its own value with nothing arriving", 1 / 1.5)
P99_TARGETS = {VLLM: Target("at least 15x better than vLLM's best aggregated", 15.0)}
LONG_TARGETS = {VLLM: Target("at most 2x aggregated vLLM's", 0.5)}
LONG_TTFT = Metric("long prompts' TTFT p50", "ms", is_rate=False)
LAST_LONG_TTFT = Metric("last long prompt's TTFT", "ms", is_rate=False)


def interference(args: argparse.Namespace, lineup: Lineup) -> list[Row]:
    first, second = args.cpus[:2]
    lineup.ours(f"{OURS} split", Cores((first,), (second,)), args.flag, [first])
    lineup.ours(f"{OURS} aggregated", Cores((), (first, second)), args.flag, [first, second], family=OURS_AGGREGATED)
    add_vllm(lineup, [first, second], args.vllm_dtype)
    for chunk in args.vllm_chunks:
        add_vllm(lineup, [first, second], args.vllm_dtype, [f"--max-num-batched-tokens={chunk}"], f", chunks of {chunk}")
    add_vllm_split(lineup, [first], [second], args.vllm_dtype)
    vocab, num_long = vocab_size(args.model), 2 if args.quick else NUM_LONG

    def measure(num: int, every_s: float) -> dict[str, list[Interference]]:
        def take(contestant: Contestant, turn: int) -> Interference:
            return steady_and_long(contestant.endpoint, vocab, f"{every_s} {turn}", num, every_s)  # prompts that no cache has seen

        return lineup.measure(args.turns, args.warmup, take)

    quiet = measure(0, 0.0)
    own_p99 = lineup.series(quiet, _p99_ms)[0]
    rows = _steady_rows(lineup, f"W4 {STEADY} x {NUM_STEADY}, nothing arrives", quiet, {})
    for every_s in EVERY_S:
        case = f"W4 {STEADY} x {NUM_STEADY}, {num_long} of {LONG} every {every_s:g} s"
        taken = measure(num_long, every_s)
        rows += _steady_rows(lineup, case, taken, P99_TARGETS)
        rows += _absolute_rows(case, lineup.series(taken, _p99_ms)[0], own_p99)
        middle = lineup.series(taken, lambda t: statistics.median(t.long_ttft_s) * 1e3)
        last = lineup.series(taken, lambda t: t.long_ttft_s[-1] * 1e3)
        rows += [*compare(case, LONG_TTFT, middle, LONG_TARGETS), *compare(case, LAST_LONG_TTFT, last)]
    return rows


def _steady_rows(lineup: Lineup, case: str, taken: dict[str, list[Interference]], targets: dict[str, Target]) -> list[Row]:
    middle = lineup.series(taken, lambda t: statistics.median(t.itl_s) * 1e3)
    return [*compare(case, ITL_P50, middle), *compare(case, ITL_P99, lineup.series(taken, _p99_ms), targets)]


def _absolute_rows(case: str, loaded: Series, quiet: Series) -> list[Row]:
    return [
        alone(case, ITL_P99, loaded, f"at most {MAX_P99_MS:g} ms", loaded.median <= MAX_P99_MS),
        row(case, ITL_P99, loaded, replace(quiet, name="itself, nothing arriving"), OWN_TARGET),
    ]


def _p99_ms(taken: Interference) -> float:
    return percentile(taken.itl_s, 99) * 1e3
