"""Serving, measured at the client: time to first token, gaps between tokens, tokens a second.

    python benchmarks/serve.py handoff     split against aggregated, one request at a time, interleaved
    python benchmarks/serve.py batching    W2: several streams at once, split and aggregated
    python benchmarks/serve.py gap         what the hand-off of a prompt of eight chunks adds to token 1 and to token 2
    python benchmarks/serve.py idle        what an idle fleet costs, and the memory of each process

Fleets are started here, on this machine, and both stay up for the whole run, so that A and B alternate request by request.
Prompts are token ids, different for every request (no prefix is ever cached), lengths exact (`ignore_eos`).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.report import Row, half_spread, write
from splitfire.cli.client import Client
from splitfire.cli.supervisor import Fleet, FleetPlan, free_port
from splitfire.v1 import inference_pb2 as pb

SPLIT, AGGREGATED = "split", "aggregated"
GAP_CHUNKS, GAP_CHUNK_TOKENS = 8, 240  # 1920 tokens: pico's context of 2048 leaves room for the answer
GAP_TURNS = 4  # times --turns: a 99th percentile wants many


@dataclass(frozen=True, slots=True)
class Answer:
    """Instants of one streamed answer, seconds since it was asked for; one for each token."""

    token_times: tuple[float, ...]
    kv_bytes: int

    @property
    def ttft_s(self) -> float:
        return self.token_times[0]

    @property
    def second_gap_s(self) -> float:
        return self.token_times[1] - self.token_times[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times[1:], self.token_times[2:], strict=False)]


class Endpoint:
    """A gRPC server of ours, with this process's clock."""

    def __init__(self, address: str, vocab_size: int) -> None:
        self._client = Client(address)
        self._vocab_size = vocab_size

    def ask(self, prompt_tokens: int, output_tokens: int, draw: random.Random) -> Answer:
        request = pb.GenerateRequest(
            prompt_token_ids=[draw.randrange(1, self._vocab_size) for _ in range(prompt_tokens)],
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingParams(max_tokens=output_tokens, ignore_eos=True),
        )
        times: list[float] = []
        kv_bytes = 0
        began = time.perf_counter()
        for response in self._client.generate(request, 600.0):
            now = time.perf_counter() - began
            times += [now] * len(response.token_ids)
            kv_bytes += response.summary.kv_transfer.bytes
        assert len(times) == output_tokens, (len(times), output_tokens)
        return Answer(tuple(times), kv_bytes)


@contextlib.contextmanager
def fleet(kind: str, model: str, cpus: Sequence[int], flags: Sequence[str]) -> Iterator[Fleet]:
    """Split: one prefill and one decode worker, a core each. Aggregated: one worker, on the second core alone."""
    is_split = kind == SPLIT
    plan = FleetPlan(
        model, Path(model).name, int(is_split), 1, tuple(cpus[:1]) if is_split else (), tuple(cpus[1:2]), free_port(),
        router_flags=("--split=always",) if is_split else ("--split=never",), worker_flags=tuple(flags),
    )  # fmt: skip
    started = Fleet(plan, print)
    try:
        started.start()
        started.wait_ready()
        yield started
    finally:
        started.stop()


def handoff(args: argparse.Namespace) -> list[Row]:
    """TTFT and the gap to token 2, one request at a time, A and B in turn."""
    rows = []
    with fleet(SPLIT, args.model, args.cpus, args.flag) as a, fleet(AGGREGATED, args.model, args.cpus, args.flag) as b:
        endpoints = {kind: Endpoint(f.address, vocab_size(f)) for kind, f in ((SPLIT, a), (AGGREGATED, b))}
        draw = random.Random(1)
        for prompt in args.prompts:
            answers: dict[str, list[Answer]] = {SPLIT: [], AGGREGATED: []}
            for turn in range(args.warmup + args.turns):
                for kind, endpoint in endpoints.items():
                    answer = endpoint.ask(prompt, args.output, draw)
                    if turn >= args.warmup:
                        answers[kind].append(answer)
            assert all(x.kv_bytes for x in answers[SPLIT])
            assert not any(x.kv_bytes for x in answers[AGGREGATED])
            rows += _handoff_rows(f"{prompt}/{args.output}", answers)
    return rows


def _handoff_rows(case: str, answers: dict[str, list[Answer]]) -> list[Row]:
    ms = {kind: [x.ttft_s * 1e3 for x in found] for kind, found in answers.items()}
    split, whole = statistics.median(ms[SPLIT]), statistics.median(ms[AGGREGATED])
    rows = [
        Row(
            case,
            "TTFT p50",
            "ms",
            split,
            whole,
            AGGREGATED,
            whole / split,
            "at most aggregated + 10 ms",
            split <= whole + 10,
            half_spread(ms[SPLIT]),
        )
    ]
    second = {kind: [x.second_gap_s * 1e3 for x in found] for kind, found in answers.items()}
    gap, whole_gap = statistics.median(second[SPLIT]), statistics.median(second[AGGREGATED])
    rows.append(
        Row(
            case,
            "token 2 after token 1, p50",
            "ms",
            gap,
            whole_gap,
            AGGREGATED,
            whole_gap / gap,
            "at most 15 ms",
            gap <= 15,
            half_spread(second[SPLIT]),
        )
    )
    itl = {kind: [g * 1e3 for x in found for g in x.gaps_s] for kind, found in answers.items()}
    ours, theirs = statistics.median(itl[SPLIT]), statistics.median(itl[AGGREGATED])
    rows.append(Row(case, "ITL p50", "ms", ours, theirs, AGGREGATED, theirs / ours, "", None, half_spread(itl[SPLIT])))
    return rows


def gap(args: argparse.Namespace) -> list[Row]:
    """A prompt of eight chunks, and the same with one token of answer, which ends at prefill and moves nothing, in turn."""
    prompt = GAP_CHUNKS * GAP_CHUNK_TOKENS
    flags = [*args.flag, f"--chunk-tokens={GAP_CHUNK_TOKENS}"]
    shipped: list[Answer] = []
    unshipped: list[Answer] = []
    with fleet(SPLIT, args.model, args.cpus, flags) as running:
        endpoint, draw = Endpoint(running.address, vocab_size(running)), random.Random(1)
        for turn in range(args.warmup + GAP_TURNS * args.turns):
            for answers, output in ((shipped, args.output), (unshipped, 1)):
                answer = endpoint.ask(prompt, output, draw)
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
    for name, value, more in (("p50", statistics.median(seconds), 3), ("p99", _p99(seconds), 8)):
        rows.append(
            Row(
                case, f"token 2 after token 1, {name}", "ms", value, step, "one decode step, p50", step / value,
                f"at most a decode step + {more} ms", value <= step + more, half_spread(seconds),
            )
        )  # fmt: skip
    return rows


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


def batching(args: argparse.Namespace) -> list[Row]:
    """W2: all streams start together; tokens a second of the whole, first token excluded from nothing."""
    rows = []
    with fleet(SPLIT, args.model, args.cpus, args.flag) as a, fleet(AGGREGATED, args.model, args.cpus, args.flag) as b:
        endpoints = {kind: Endpoint(f.address, vocab_size(f)) for kind, f in ((SPLIT, a), (AGGREGATED, b))}
        for streams in args.streams:
            rates: dict[str, list[float]] = {SPLIT: [], AGGREGATED: []}
            for turn in range(args.warmup + args.turns):
                for kind, endpoint in endpoints.items():
                    rate = _streams(endpoint, streams, args.prompts[0], args.output, turn)
                    if turn >= args.warmup:
                        rates[kind].append(rate)
            ours, theirs = statistics.median(rates[SPLIT]), statistics.median(rates[AGGREGATED])
            case = f"{streams} streams of {args.prompts[0]}/{args.output}"
            rows.append(
                Row(case, "tokens/s", "tokens/s", ours, theirs, AGGREGATED, ours / theirs, "", None, half_spread(rates[SPLIT]))
            )
    return rows


def _streams(endpoint: Endpoint, streams: int, prompt: int, output: int, seed: int) -> float:
    with ThreadPoolExecutor(streams) as pool:
        began = time.perf_counter()
        asked = [pool.submit(endpoint.ask, prompt, output, random.Random(seed * 1000 + i)) for i in range(streams)]
        for one in asked:
            one.result()
        return streams * output / (time.perf_counter() - began)


def idle(args: argparse.Namespace) -> list[Row]:
    """Processor time of a fleet that has nothing to do, and the resident memory of each process."""
    rows = []
    with fleet(SPLIT, args.model, args.cpus, args.flag) as running:
        Endpoint(running.address, vocab_size(running)).ask(256, 32, random.Random(1))
        processes = [(c.name, psutil.Process(c.process.pid)) for c in running.children if c.process is not None]
        everybody = [p for _, top in processes for p in (top, *top.children(recursive=True))]
        time.sleep(3)
        before, began = sum(_cpu(p) for p in everybody), time.perf_counter()
        time.sleep(args.seconds)
        share = (sum(_cpu(p) for p in everybody) - before) / (time.perf_counter() - began) * 100
        rows.append(Row("idle fleet", "processor", "% of a core", share, None, "", None, "under 3 % of a core", share < 3, 0.0))
        for name, top in processes:
            for process in (top, *top.children(recursive=True)):
                label = name if process is top else f"{name}, tokenizer process"
                megabytes = process.memory_info().rss / 1e6
                rows.append(Row(label, "resident memory", "MB", megabytes, None, "", None, "", None, 0.0))
    return rows


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def vocab_size(running: Fleet) -> int:
    with Client(running.address) as client:
        return client.model().vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("handoff", "batching", "gap", "idle"))
    parser.add_argument("--model", default="pico")
    parser.add_argument("--cpus", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1])
    parser.add_argument("--prompts", type=lambda s: [int(x) for x in s.split(",")], default=[64, 256, 512, 1024])
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--streams", type=lambda s: [int(x) for x in s.split(",")], default=[4, 8, 16])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--flag", action="append", default=[], help="for every worker, such as --flag=--dtype=fp32")
    args = parser.parse_args()
    rows = {"handoff": handoff, "batching": batching, "gap": gap, "idle": idle}[args.what](args)
    write(f"serve-{args.what}-{args.model.rstrip('/').split('/')[-1]}", rows)


if __name__ == "__main__":
    main()
