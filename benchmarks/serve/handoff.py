"""What splitting costs one request: `handoff` beside aggregated, and `gap`, a prompt of eight chunks beside one that moves nothing.

Both fleets stay up for the whole run, so that A and B alternate request by request. Prompts differ for every request (no
prefix is ever cached), lengths are exact.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

from benchmarks.report import Row, half_spread
from benchmarks.serve.answers import Answer, percentile
from benchmarks.serve.endpoints import GrpcEndpoint, ask, random_prompt
from benchmarks.serve.fleets import AGGREGATED, SPLIT, cores_of, fleet, vocab_size

GAP_CHUNKS, GAP_CHUNK_TOKENS = 8, 240  # 1920 tokens: pico's context of 2048 leaves room for the answer
GAP_TURNS = 4  # times --turns: a 99th percentile wants many


def handoff(args: argparse.Namespace) -> list[Row]:
    """TTFT and the gap to token 2, one request at a time, A and B in turn."""
    rows = []
    cores = {kind: cores_of(kind, args.cpus) for kind in (SPLIT, AGGREGATED)}
    vocab = vocab_size(args.model)
    with fleet(args.model, cores[SPLIT], args.flag) as a, fleet(args.model, cores[AGGREGATED], args.flag) as b:
        endpoints = {kind: GrpcEndpoint(f.address) for kind, f in ((SPLIT, a), (AGGREGATED, b))}
        draw = random.Random(1)
        for prompt in args.prompts:
            answers: dict[str, list[Answer]] = {SPLIT: [], AGGREGATED: []}
            for turn in range(args.warmup + args.turns):
                for kind, endpoint in endpoints.items():
                    answer = ask(endpoint, random_prompt(draw, prompt, vocab), args.output)
                    if turn >= args.warmup:
                        answers[kind].append(answer)
            assert all(x.kv_bytes for x in answers[SPLIT])
            assert not any(x.kv_bytes for x in answers[AGGREGATED])
            rows += _handoff_rows(f"{prompt}/{args.output}", answers)
    return rows


def _handoff_rows(case: str, answers: dict[str, list[Answer]]) -> list[Row]:
    def row(metric: str, read: Callable[[Answer], list[float]], target: str, bound: Callable[[float, float], bool] | None) -> Row:
        ours, theirs = ([s * 1e3 for x in answers[kind] for s in read(x)] for kind in (SPLIT, AGGREGATED))
        split, whole = statistics.median(ours), statistics.median(theirs)
        met = None if bound is None else bound(split, whole)
        return Row(case, metric, "ms", split, whole, AGGREGATED, whole / split, target, met, half_spread(ours))

    return [
        row("TTFT p50", lambda x: [x.ttft_s], "at most aggregated + 10 ms", lambda split, whole: split <= whole + 10),
        row("token 2 after token 1, p50", lambda x: [x.second_gap_s], "at most 15 ms", lambda split, _: split <= 15),
        row("ITL p50", lambda x: x.gaps_s, "", None),
    ]


def gap(args: argparse.Namespace) -> list[Row]:
    """A prompt of eight chunks, and the same with one token of answer, which ends at prefill and moves nothing, in turn."""
    prompt = GAP_CHUNKS * GAP_CHUNK_TOKENS
    flags = [*args.flag, f"--chunk-tokens={GAP_CHUNK_TOKENS}"]
    shipped: list[Answer] = []
    unshipped: list[Answer] = []
    with fleet(args.model, cores_of(SPLIT, args.cpus), flags) as running:
        endpoint, draw, vocab = GrpcEndpoint(running.address), random.Random(1), vocab_size(args.model)
        for turn in range(args.warmup + GAP_TURNS * args.turns):
            for answers, output in ((shipped, args.output), (unshipped, 1)):
                answer = ask(endpoint, random_prompt(draw, prompt, vocab), output)
                if turn >= args.warmup:
                    answers.append(answer)
    assert all(x.kv_bytes for x in shipped)
    assert not any(x.kv_bytes for x in unshipped)
    return _gap_rows(f"{GAP_CHUNKS} chunks of {GAP_CHUNK_TOKENS}/{args.output}", shipped, unshipped)


def _gap_rows(case: str, shipped: list[Answer], unshipped: list[Answer]) -> list[Row]:
    firsts, plain = [x.ttft_s * 1e3 for x in shipped], [x.ttft_s * 1e3 for x in unshipped]
    added = [a - b for a, b in zip(firsts, plain, strict=True)]  # of neighbours in time: their spread is far below the TTFT's
    seconds, steps = [x.second_gap_s * 1e3 for x in shipped], [g * 1e3 for x in shipped for g in x.gaps_s]
    first, alone, step = statistics.median(firsts), statistics.median(plain), statistics.median(steps)
    more_ms = statistics.median(added)
    rows = [
        Row(case, "TTFT p50", "ms", first, alone, "same prefill, nothing moved", alone / first, "", None, half_spread(firsts)),
        Row(case, "TTFT, what moving adds, p50", "ms", more_ms, None, "", None, "at most 2 ms", more_ms <= 2, half_spread(added)),
    ]
    for name, value, more in (("p50", statistics.median(seconds), 3), ("p99", percentile(seconds, 99), 8)):
        rows.append(
            Row(
                case, f"token 2 after token 1, {name}", "ms", value, step, "one decode step, p50", step / value,
                f"at most a decode step + {more} ms", value <= step + more, half_spread(seconds),
            )
        )  # fmt: skip
    return rows
