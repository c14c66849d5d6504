"""W8 played to real routers on engines that behave alike: ours, sglang-router with its cache-aware policy, and Dynamo's KV router.

Ours and Dynamo's get token ids, sglang-router words, one a token, so that equal prefixes are equal for everybody. Engines are fake and
aggregated: first in, first out, with a prefix cache that evicts the least recently used block. A token takes 2 ms; after the first
they come eight at a time, or HTTP engines and clients in Python would be what is measured.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.opponents.server import ServerFailed
from benchmarks.report import Row
from benchmarks.router import dynamo
from benchmarks.router.dynamo import DYNAMO, DynamoFailed
from benchmarks.router.engine import Speed
from benchmarks.router.fake_worker import FleetShape, Told
from benchmarks.router.http_load import completion
from benchmarks.router.load import Answer, errors_of
from benchmarks.router.others import SGLANG, other
from benchmarks.router.rig import rig
from router.simulation.w8 import w8 as generate
from splitfire.v1 import inference_pb2 as pb

NUM_ENGINES, BLOCK_SIZE = 4, 16
IDS = range(300, 4000)  # of pico's vocabulary
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the trace."""

    at_s: float
    ids: Sequence[int]
    max_tokens: int

    def body(self) -> bytes:
        stopping = pb.StoppingParams(max_tokens=self.max_tokens, ignore_eos=True)
        return pb.GenerateRequest(prompt_token_ids=self.ids, stopping=stopping).SerializeToString()

    def words(self) -> bytes:
        return completion(" ".join(f"w{token_id}" for token_id in self.ids), self.max_tokens)


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it."""

    hit_rate: float
    ttft_ms: Sequence[float]  # sorted

    @property
    def mean(self) -> float:
        return sum(self.ttft_ms) / len(self.ttft_ms)

    def quantile(self, q: float) -> float:
        return self.ttft_ms[min(len(self.ttft_ms) - 1, int(q * len(self.ttft_ms)))]


Play = Callable[[Sequence[Prompt]], Played]


def w8(turns: int, seconds: float) -> list[Row]:
    """One seed a turn, three at most; `seconds` under 1: a part of the trace."""
    rows: list[Row] = []
    for rate, num_cached in ((1.0, 1250), (2.0, 1250), (1.0, 600)):
        case = f"{num_cached} blocks, {rate:g}x the rate"
        speed = Speed(prompt_s=0.002, token_s=6e-5, step_s=0.016, tokens_per_step=8, cached_blocks=num_cached)
        contestants: dict[str, Play] = {
            "cost": partial(_ours, speed, "cost"),
            "round_robin": partial(_ours, speed, "round_robin"),
            SGLANG: partial(_theirs, speed, SGLANG),
            DYNAMO: partial(_dynamos, speed),
        }
        taken: dict[str, list[Played]] = {name: [] for name in contestants}
        for seed in range(min(turns, 3)):
            prompts = prompts_of(seed, rate)[: None if seconds >= 1 else 40]
            for name, play in contestants.items():
                try:
                    taken[name].append(play(prompts))
                except (ServerFailed, DynamoFailed, RuntimeError) as exc:
                    rows.append(Row(case, f"skipped: {exc}", "", 0.0, None, name, None, "", None, 0.0))
        rows += _rows(case, taken, rate, num_cached)
    return rows


def prompts_of(seed: int, rate: float) -> list[Prompt]:
    """The trace's blocks spelled out: a block's ids follow from its name, what is no full block belongs to one prompt alone."""
    prompts = []
    for number, arrival in enumerate(generate(seed).at_rate(rate).arrivals):
        ids = list(itertools.chain.from_iterable(random.Random(name).choices(IDS, k=BLOCK_SIZE) for name in arrival.names))
        ids += random.Random(f"{seed} {number}").choices(IDS, k=arrival.num_tokens - len(ids))
        prompts.append(Prompt(arrival.at_s, ids, arrival.num_output))
    return prompts


def _ours(speed: Speed, policy: str, prompts: Sequence[Prompt]) -> Played:
    with rig(
        FleetShape(0, NUM_ENGINES, speed, BLOCK_SIZE), ("--split=never", f"--placement={policy}", "--max-requests=4096")
    ) as made:
        time.sleep(1.0)  # every worker has reported
        answers = made.clients[0].do("played", [p.body() for p in prompts], [p.at_s for p in prompts], TIMEOUT_S)
        told: Told = made.workers.do("told")
        return _played(answers, told.cached_tokens / told.prompt_tokens)


def _theirs(speed: Speed, name: str, prompts: Sequence[Prompt]) -> Played:
    with other(name, speed, BLOCK_SIZE, NUM_ENGINES, "cache_aware") as made:
        answers = made.clients.do("played", [p.words() for p in prompts], [p.at_s for p in prompts], TIMEOUT_S)
        return _played(answers, made.engines.do("hit_rate"))


def _dynamos(speed: Speed, prompts: Sequence[Prompt]) -> Played:
    asked = [(p.at_s, p.ids, p.max_tokens) for p in prompts]
    ttft_s, hit_rate = dynamo.play(speed, BLOCK_SIZE, NUM_ENGINES, asked)
    return Played(hit_rate, sorted(1e3 * s for s in ttft_s))


def _played(answers: Sequence[Answer], hit_rate: float) -> Played:
    if errors := errors_of(answers):
        raise RuntimeError(f"requests failed: {dict(errors)}")
    return Played(hit_rate, sorted(1e3 * a.ttft_s for a in answers))


def _rows(case: str, taken: dict[str, list[Played]], rate: float, num_cached: int) -> list[Row]:
    ours = taken.pop("cost")
    if not ours:
        return []
    hit = _mean([p.hit_rate for p in ours])
    least = {(1.0, 1250): 0.64, (1.0, 600): 0.55}.get((rate, num_cached))
    target, met = (f"at least {least}", hit >= least) if least else ("", None)
    rows = [Row(case, "hit rate", "", hit, None, "", None, target, met, 0.0)]
    for name, others in taken.items():
        if not others:
            continue
        hits = _mean([p.hit_rate for p in others])
        rows.append(Row(case, "hit rate", "", hit, hits, name, hit / hits, "", None, 0.0))
        metrics: dict[str, Callable[[Played], float]] = {"TTFT mean": lambda p: p.mean, "TTFT p99": lambda p: p.quantile(0.99)}
        for metric, read in metrics.items():
            a, b = _mean([read(p) for p in ours]), _mean([read(p) for p in others])
            words, bound = _target(name, metric, rate)
            rows.append(Row(case, metric, "ms", a, b, name, b / a, words, b / a >= bound if bound else None, 0.0))
    return rows


def _target(name: str, metric: str, rate: float) -> tuple[str, float]:
    if name in (SGLANG, DYNAMO):
        return "better", 1.0
    is_bound = name == "round_robin" and metric == "TTFT p99" and rate == 2.0
    return ("at most 0.40x", 2.5) if is_bound else ("", 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
