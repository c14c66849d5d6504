"""Which requests come, and when. Pure: the same seed, rate and round plan the same requests for whoever is asked.

A Poisson process of which `rate * seconds` arrive, rounded, is so many instants drawn evenly over the time: drawing them like that keeps
the offered rate exact, where drawing gaps would let it stray by a tenth and more in a run of some hundred requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from splitfire.cli.bench.flags import MAX_RATE, Lengths
from splitfire.core.workload_trace import Arrival, Trace

FIRST_RATE, LEAST_RATE = 1.0, 1 / 16  # where `auto` begins, and where it gives up when nothing is ever in time
IS_LESS = 0.95  # goodput has fallen when it is under this share of the best so far


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. `at_s` counts from the run's begin; `names` are those of a trace's leading blocks of `block_size` tokens."""

    at_s: float
    num_prompt: int
    num_output: int
    is_measured: bool  # else it is of the warm-up
    names: tuple[str, ...] = ()
    block_size: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """A run: a warm-up that does not count, then the time that does."""

    warmup_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        return self.warmup_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests are like when no trace says so."""

    prompt: Lengths
    output: Lengths


def instants(random: Random, rate: float, begin_s: float, end_s: float) -> list[float]:
    """At least one when there is any time at all."""
    if end_s <= begin_s:
        return []
    count = max(1, round(rate * (end_s - begin_s)))
    return sorted(begin_s + random.random() * (end_s - begin_s) for _ in range(count))


def plan_poisson(seed: int, rate: float, turn: int, window: Window, shape: Shape) -> list[Planned]:
    random = Random(f"{seed} {rate} {turn}")
    times = [(at, False) for at in instants(random, rate, 0.0, window.warmup_s)]
    times += [(at, True) for at in instants(random, rate, window.warmup_s, window.end_s)]
    return [Planned(at, shape.prompt.draw(random), shape.output.draw(random), is_measured) for at, is_measured in times]


def plan_trace(trace: Trace, rate: float, window: Window) -> list[Planned]:
    """The trace from its begin, so much faster or slower that its mean rate is `rate`; over again, with other blocks, when it is at its end."""
    speed = rate / mean_rate(trace)
    planned = []
    for at_s, lap, arrival in _laps(trace):
        due = at_s / speed
        if due >= window.end_s:
            break
        names = tuple(f"{lap} {name}" for name in arrival.names)
        is_measured = due >= window.warmup_s
        planned.append(Planned(due, arrival.num_tokens, arrival.num_output, is_measured, names, trace.block_size))
    return planned


def mean_rate(trace: Trace) -> float:
    """Requests a second: one over the mean gap. Those that all come at once are taken to be a second's."""
    count, last_s = len(trace.arrivals), trace.arrivals[-1].at_s
    return (count - 1) / last_s if last_s > 0 else float(count)


def fit(planned: Iterable[Planned], context: int) -> tuple[list[Planned], int]:
    """Requests that a model of so many tokens takes, and how many were cut for it: the answer first, to half of them."""
    fitted, num_cut = [], 0
    for request in planned:
        num_output = min(request.num_output, max(1, context // 2))
        num_prompt = min(request.num_prompt, context - num_output)
        cut = replace(request, num_prompt=num_prompt, num_output=num_output)
        num_cut += cut != request
        fitted.append(cut)
    return fitted, num_cut


def next_rate(seen: Sequence[tuple[float, float]]) -> float | None:
    """Of `auto`, after (rate, goodput) of the rates so far, in order: twice the last, until goodput falls; down when the first had none."""
    if not seen:
        return FIRST_RATE
    rate, goodput = seen[-1]
    if rate <= FIRST_RATE and goodput == 0:
        return rate / 2 if rate / 2 >= LEAST_RATE else None
    if rate < FIRST_RATE:  # on the way down something was in time: what is above has been seen
        return None
    best = max(goodput for _, goodput in seen)
    return rate * 2 if goodput >= IS_LESS * best and rate * 2 <= MAX_RATE else None


def _laps(trace: Trace) -> Iterator[tuple[float, int, Arrival]]:
    length_s = len(trace.arrivals) / mean_rate(trace)
    for lap in itertools.count():
        for arrival in trace.arrivals:
            yield arrival.at_s + lap * length_s, lap, arrival
