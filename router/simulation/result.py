"""What came of a simulated trace, in the numbers that a measured run has too. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, pstdev, quantiles

from router.simulation.fleet import SimulatedFleet


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Result:
    """`imbalance`: of the seconds of what each worker had to compute of prompts, deviation over mean. ITL counts every gap between two
    tokens of a decoding sequence; TPOT is a mean for each request, what it waited for hand-off and room among it."""

    hit_rate: float  # tokens that were not computed, of all prompts'
    ttft: Spread
    itl: Spread
    tpot: Spread
    imbalance: float
    router_wait: Spread  # from arrival to dispatch
    seconds: float  # from the first arrival to the last token
    num_tokens_out: int


def result_of(fleet: SimulatedFleet) -> Result:
    jobs, workers = fleet.jobs, list(fleet.workers.values())
    overhead_s = workers[0].engine.overhead_s
    first = [(job.first_s or 0.0) - job.arrival.at_s + overhead_s for job in jobs]
    several = [job for job in jobs if job.arrival.num_output > 1]
    busy = [worker.uncached_s for worker in workers if worker.is_prefill or workers[0].name[:1] == b"d"]
    return Result(
        hit_rate=sum(job.num_cached for job in jobs) / sum(job.arrival.num_tokens for job in jobs),
        ttft=spread(first),
        itl=weighted_spread(gap for worker in workers for gap in worker.sequences.gaps),
        tpot=spread([((job.ended_s or 0.0) - (job.first_s or 0.0)) / (job.arrival.num_output - 1) for job in several]),
        imbalance=pstdev(busy) / fmean(busy),
        router_wait=spread([job.dispatched_s - job.arrival.at_s for job in jobs]),
        seconds=max(job.ended_s or 0.0 for job in jobs) - jobs[0].arrival.at_s,
        num_tokens_out=sum(job.arrival.num_output for job in jobs),
    )


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(*[values[0] if values else 0.0] * 5)
    hundredths = quantiles(values, n=100, method="inclusive")
    return Spread(fmean(values), *(hundredths[percent - 1] for percent in (50, 90, 95, 99)))


def weighted_spread(gaps: Iterable[tuple[float, int]]) -> Spread:
    """Of values that stand for several each."""
    ordered = sorted(gaps)
    total = sum(count for _, count in ordered)
    if not total:
        return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
    wanted, found, seen = [0.5, 0.9, 0.95, 0.99], [], 0
    for value, count in ordered:
        seen += count
        while wanted and seen >= wanted[0] * total:
            found.append(value)
            wanted.pop(0)
    return Spread(sum(value * count for value, count in ordered) / total, *found)


def mean_of(results: Sequence[Result]) -> Result:
    """Of runs with several seeds: the mean of every number."""
    spreads = {
        field: Spread(*(fmean(getattr(getattr(result, field), part.name) for result in results) for part in fields(Spread)))
        for field in ("ttft", "itl", "tpot", "router_wait")
    }
    return Result(
        hit_rate=fmean(result.hit_rate for result in results),
        imbalance=fmean(result.imbalance for result in results),
        seconds=fmean(result.seconds for result in results),
        num_tokens_out=round(fmean(result.num_tokens_out for result in results)),
        **spreads,
    )
