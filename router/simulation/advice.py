"""Split or not, and in which ratio: every way to divide N workers, simulated under the same load, and the verdict in words. Pure.

A way is judged by its worse side: the 90th percentile of TTFT over its target, or the 99th of the gaps between tokens over theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from router.simulation.engine import Engine
from router.simulation.fleet import Setup, simulate
from router.simulation.result import Result, result_of
from router.simulation.text import Text
from splitfire.core.workload_trace import Trace

LOADS = (0.3, 0.6, 0.9)  # of what the same workers could do without splitting
NUM_REQUESTS = 1500
SIGMA = 0.6  # lengths are log-normal
SAME = 1.05  # a way that is better by less is not worth its trouble
SLOW_TTFT, SLOW_ITL = 4.0, 3.0  # targets: so many times those of a request alone
LEAST_TTFT_S = 0.05


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests: tokens of prompt and of answer at the mean, both log-normal; nothing is found in a cache."""

    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds."""

    ttft_p90: float
    itl_p99: float


@dataclass(frozen=True, slots=True)
class Way:
    """How the workers are divided; no prefill worker: they do both."""

    num_prefill: int
    num_decode: int
    result: Result

    @property
    def name(self) -> str:
        return f"{self.num_prefill}:{self.num_decode}" if self.num_prefill else "aggregated"

    def badness(self, targets: Targets) -> float:
        """At most 1: both targets are met."""
        return max(self.result.ttft.p90 / targets.ttft_p90, self.result.itl.p99 / targets.itl_p99)


@dataclass(frozen=True, slots=True)
class Advice:
    """For one load: all ways, the best first."""

    rate: float
    targets: Targets
    ways: Sequence[Way]

    @property
    def aggregated(self) -> Way:
        return next(way for way in self.ways if not way.num_prefill)

    @property
    def choice(self) -> Way:
        """Splitting has to be clearly better."""
        best = self.ways[0]
        return best if best.badness(self.targets) * SAME < self.aggregated.badness(self.targets) else self.aggregated

    def sentence(self) -> str:
        choice, other = self.choice, self.aggregated
        if choice is other:
            split = next((way for way in self.ways if way.num_prefill), None)
            text = "do not split"
            if split is not None:
                text += f": the best ratio, {split.name}, has {_beside(split.result, other.result)} without splitting"
        else:
            text = f"split {choice.name} (prefill:decode): {_beside(choice.result, other.result)} without splitting"
        if choice.badness(self.targets) > 1:
            text += "; the targets are missed in any case: more workers, or less load"
        return f"At {self.rate:.3g} requests/s {text}."


def advise(
    engine: Engine, num_workers: int, mix: Mix, rates: Sequence[float], targets: Targets, num_requests: int = NUM_REQUESTS
) -> list[Advice]:
    """For each rate, in requests a second."""
    found = []
    for rate in rates:
        trace = poisson(mix, rate, num_requests, engine.block_size, seed=0)
        ways = []
        for num_prefill in range(num_workers):
            fleet = simulate(trace, Setup(engine, num_prefill, num_workers - num_prefill))
            ways.append(Way(num_prefill, num_workers - num_prefill, result_of(fleet)))
        found.append(Advice(rate, targets, sorted(ways, key=lambda way: way.badness(targets))))
    return found


def capacity(engine: Engine, num_workers: int, mix: Mix) -> float:
    """Requests a second that the workers could take without splitting, busy all the time with as many sequences as there is room for."""
    room = engine.num_blocks * engine.block_size // (mix.num_prompt + mix.num_output)
    batch = max(1, min(engine.max_running, room))
    context = batch * (mix.num_prompt + mix.num_output // 2)
    token_s = engine.step.seconds(batch, context) / batch
    return num_workers / (engine.prompt.seconds(mix.num_prompt) + (mix.num_output - 1) * token_s)


def default_targets(engine: Engine, mix: Mix) -> Targets:
    alone_s = engine.prompt.seconds(mix.num_prompt) + engine.overhead_s
    return Targets(max(LEAST_TTFT_S, SLOW_TTFT * alone_s), SLOW_ITL * engine.step.seconds(1, mix.num_prompt))


def poisson(mix: Mix, rate: float, num_requests: int, block_size: int, seed: int) -> Trace:
    """Arrivals that know nothing of one another; every prompt is new."""
    random, text = Random(seed), Text(block_size)
    at, arrivals = 0.0, []
    for _ in range(num_requests):
        at += random.expovariate(rate)
        num_prompt, num_output = (_length(random, mean) for mean in (mix.num_prompt, mix.num_output))
        arrivals.append(text.arrival(at, text.new(num_prompt), num_output))
    return Trace(f"poisson-{seed}", block_size, arrivals)


def _length(random: Random, mean: int) -> int:
    """At most six times the mean."""
    return max(1, min(6 * mean, round(mean * random.lognormvariate(-SIGMA * SIGMA / 2, SIGMA))))


def _beside(ours: Result, other: Result) -> str:
    ttft, itl = (f"{a * 1e3:.0f} ms" for a in (ours.ttft.p90, ours.itl.p99))
    return f"TTFT p90 {ttft} and ITL p99 {itl}, against {other.ttft.p90 * 1e3:.0f} and {other.itl.p99 * 1e3:.0f} ms"
