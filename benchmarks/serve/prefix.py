"""W5 on both cores: prompts that begin alike, with a prefix cache and without, ours beside vLLM and OpenVINO GenAI."""

from __future__ import annotations

import argparse

from benchmarks.report import Row
from benchmarks.serve.comparisons import RATE, Metric, Target, alone, compare
from benchmarks.serve.contestants import OURS, Lineup
from benchmarks.serve.entrants import VLLM, add_openvino, add_vllm
from benchmarks.serve.fleets import Cores, vocab_size
from benchmarks.serve.workloads import NUM_SHARED, NUM_SHARING, SHARING_AT_ONCE, W5, sharing

TARGETS = {VLLM: Target("at least 1.4x vLLM", 1.4)}
HITS = Metric("prompt tokens from the prefix cache", "share", is_rate=True)
UNCACHED = " without a prefix cache"


def prefix(args: argparse.Namespace, lineup: Lineup) -> list[Row]:
    cpus, vocab = args.cpus, vocab_size(args.model)
    for label, ours, vllm, openvino in (
        ("", [], [], []),
        (UNCACHED, ["--no-prefix-cache"], ["--no-enable-prefix-caching"], ["--no-prefix-caching"]),
    ):
        lineup.ours(f"{OURS}{label}", Cores((), tuple(cpus)), [*args.flag, *ours], cpus)
        add_vllm(lineup, cpus, args.vllm_dtype, vllm, label)
        add_openvino(lineup, cpus, openvino, label)
    taken = lineup.measure(args.turns, args.warmup, lambda c, turn: sharing(c.endpoint, vocab, turn))
    rates = lineup.series(taken, lambda batch: batch.tokens_per_s)
    hits = lineup.series(taken, lambda batch: batch.num_cached / (NUM_SHARING * (NUM_SHARED + W5.prompt)))
    case = f"W5 {NUM_SHARING} of {NUM_SHARED}+{W5}, {SHARING_AT_ONCE} at a time"
    return [
        *compare(case, RATE, [s for s in rates if UNCACHED not in s.name], TARGETS),
        alone(case, HITS, hits[0]),
        *compare(case + UNCACHED, RATE, [s for s in rates if UNCACHED in s.name]),
    ]
