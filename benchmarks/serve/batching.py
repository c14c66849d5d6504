"""W2 with ours alone: all streams start together, split and aggregated, in turn."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.report import Row, half_spread
from benchmarks.serve.endpoints import GrpcEndpoint
from benchmarks.serve.fleets import AGGREGATED, SPLIT, cores_of, fleet, vocab_size
from benchmarks.serve.workloads import Shape, together


def batching(args: argparse.Namespace) -> list[Row]:
    """Tokens a second of all streams, from the first request to the last token."""
    rows = []
    cores = {kind: cores_of(kind, args.cpus) for kind in (SPLIT, AGGREGATED)}
    shape, vocab = Shape(args.prompts[0], args.output), vocab_size(args.model)
    with fleet(args.model, cores[SPLIT], args.flag) as a, fleet(args.model, cores[AGGREGATED], args.flag) as b:
        endpoints = {kind: GrpcEndpoint(f.address) for kind, f in ((SPLIT, a), (AGGREGATED, b))}
        for streams in args.streams:
            rates: dict[str, list[float]] = {SPLIT: [], AGGREGATED: []}
            for turn in range(args.warmup + args.turns):
                for number, (kind, endpoint) in enumerate(endpoints.items()):
                    batch = together(endpoint, vocab, 2 * turn + number, shape, streams)
                    if turn >= args.warmup:
                        rates[kind].append(batch.tokens_per_s)
            ours, theirs = statistics.median(rates[SPLIT]), statistics.median(rates[AGGREGATED])
            case, spread = f"{streams} streams of {shape}", half_spread(rates[SPLIT])
            rows.append(Row(case, "tokens/s", "tokens/s", ours, theirs, AGGREGATED, ours / theirs, "", None, spread))
    return rows
