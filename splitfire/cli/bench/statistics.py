"""From what came when to rows of a table. Pure. Percentiles are exact: of all samples, between two of them by a straight line."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splitfire.cli.bench.flags import Slo

# Where a curve is drawn from: every hundredth, and closer at the end, which is what people ask about.
CURVE = (*(i / 100 for i in range(100)), 0.9925, 0.995, 0.9975, 0.999, 1.0)
# What a late client may hide: its own lateness is part of each TTFT, and what its loop lags by part of each gap.
LATE_SHARE_OF_TTFT, LATE_SHARE_OF_ITL = 0.1, 0.2


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """A named part of the time to one request's first token."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. `error` is empty when the whole answer came. Times are the client's, from when the request was due."""

    due_s: float
    late_s: float  # sent so much after it was due
    num_prompt: int
    num_cached: int = 0
    num_tokens: int = 0
    ttft_s: float = math.nan  # of a request without a token
    gaps_s: Sequence[float] = ()  # one for each token after the first
    error: str = ""
    phases: tuple[PhaseTime, ...] = ()

    @property
    def itl_s(self) -> float:
        """The mean gap; 0 of an answer of one token."""
        return math.fsum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0

    @property
    def end_s(self) -> float:
        """When its last token came; NaN when none did."""
        return self.due_s + self.ttft_s + math.fsum(self.gaps_s)

    def has_met_ttft(self, slo: Slo) -> bool:
        return not self.error and self.ttft_s <= slo.ttft_s

    def has_met(self, slo: Slo) -> bool:
        return self.has_met_ttft(slo) and self.itl_s <= slo.itl_s


@dataclass(frozen=True, slots=True)
class Client:
    """What the one who measured did beside: so late its loop was, and the share of a core that it used."""

    lags_s: Sequence[float] = ()
    cpu_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a variant at one rate in one round. `num_unfinished`: still answered when somebody pressed Ctrl-C; they count nowhere."""

    variant: str
    rate: float
    turn: int
    begin_s: float  # of the measured time, on the clock of `Outcome.due_s`
    duration_s: float
    outcomes: Sequence[Outcome]
    client: Client = Client()
    num_unfinished: int = 0
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of at least one sample."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    greatest: float
    curve: Sequence[float] = field(repr=False)  # at each of CURVE


@dataclass(frozen=True, slots=True)
class Row:
    """A variant at one rate, all rounds together. Distributions are of requests that were answered, None where there are none."""

    variant: str
    rate: float
    duration_s: float
    num_requests: int
    num_unfinished: int
    errors: Mapping[str, int]
    goodput: float  # requests a second that met both targets
    goodputs: Sequence[float]  # of each round
    num_met: int
    num_met_ttft: int
    ttft: Distribution | None
    itl: Distribution | None
    ttft_p90s: Sequence[float]  # of each round
    itl_p99s: Sequence[float]
    tokens_per_s: float
    cached_share: float  # of prompt tokens
    late: Distribution | None
    lag: Distribution | None
    cpu_share: float
    is_late: bool  # the client was: what is above says as much about it as about the fleet
    phases: tuple[PhaseTime, ...]  # means, of the time to the first token; empty where the fleet does not tell
    is_cut: bool

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    @property
    def share_met(self) -> float:
        return self.num_met / self.num_requests if self.num_requests else 0.0


def gaps_of(messages: Sequence[tuple[float, int]]) -> array[float]:
    """Between tokens, from (instant, tokens) of each message: the tokens of one share the gap before it; those of the first have none."""
    gaps = array("d", [0.0] * max(0, messages[0][1] - 1)) if messages else array("d")
    for (before, _), (at, count) in itertools.pairwise(messages):
        gaps.extend([(at - before) / count] * count)
    return gaps


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted samples; as numpy's default has it."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(samples: Iterable[float]) -> Distribution | None:
    ordered = sorted(samples)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    curve = [percentile(ordered, share) for share in CURVE]
    return Distribution(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1], curve)


def rows_of(cells: Sequence[Cell], slo: Slo) -> list[Row]:
    """By rate, then in the order in which variants first ran. Runs that were cut count with the time they had."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells:
        if cell.duration_s > 0:
            groups.setdefault((cell.rate, cell.variant), []).append(cell)
    return [_row(groups[key], slo) for key in sorted(groups, key=lambda key: (key[0], variants.index(key[1])))]


def _row(cells: Sequence[Cell], slo: Slo) -> Row:
    outcomes = [outcome for cell in cells for outcome in cell.outcomes]
    answered = [outcome for outcome in outcomes if not outcome.error]
    duration_s = sum(cell.duration_s for cell in cells)
    num_met = sum(outcome.has_met(slo) for outcome in outcomes)
    late = distribution(outcome.late_s for outcome in outcomes)
    lag = distribution(lag for cell in cells for lag in cell.client.lags_s)
    prompt_tokens = sum(outcome.num_prompt for outcome in answered)
    return Row(
        variant=cells[0].variant,
        rate=cells[0].rate,
        duration_s=duration_s,
        num_requests=len(outcomes),
        num_unfinished=sum(cell.num_unfinished for cell in cells),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        goodput=num_met / duration_s,
        goodputs=[sum(outcome.has_met(slo) for outcome in cell.outcomes) / cell.duration_s for cell in cells],
        num_met=num_met,
        num_met_ttft=sum(outcome.has_met_ttft(slo) for outcome in outcomes),
        ttft=distribution(outcome.ttft_s for outcome in answered),
        itl=distribution(gap for outcome in answered for gap in outcome.gaps_s),
        ttft_p90s=[found.p90 for cell in cells if (found := distribution(o.ttft_s for o in cell.outcomes if not o.error))],
        itl_p99s=[
            found.p99 for cell in cells if (found := distribution(gap for o in cell.outcomes if not o.error for gap in o.gaps_s))
        ],
        tokens_per_s=sum(map(_tokens_per_s, cells)) / len(cells),
        cached_share=sum(outcome.num_cached for outcome in answered) / prompt_tokens if prompt_tokens else 0.0,
        late=late,
        lag=lag,
        cpu_share=sum(cell.client.cpu_share for cell in cells) / len(cells),
        is_late=bool((late and late.p99 > LATE_SHARE_OF_TTFT * slo.ttft_s) or (lag and lag.p99 > LATE_SHARE_OF_ITL * slo.itl_s)),
        phases=mean_phases(answered),
        is_cut=any(cell.is_cut for cell in cells),
    )


def _tokens_per_s(cell: Cell) -> float:
    """Of answers, until the last token of the last one: under overload that is long after the last request was due."""
    answered = [outcome for outcome in cell.outcomes if not outcome.error]
    end_s = max((outcome.end_s for outcome in answered), default=0.0)
    return sum(outcome.num_tokens for outcome in answered) / max(cell.duration_s, end_s - cell.begin_s)


def mean_phases(outcomes: Iterable[Outcome]) -> tuple[PhaseTime, ...]:
    """Over all requests that tell their phases, in the order in which they come; a request without one of them counts as 0."""
    totals: dict[str, float] = {}
    count = 0
    for outcome in outcomes:
        count += bool(outcome.phases)
        for phase in outcome.phases:
            totals[phase.name] = totals.get(phase.name, 0.0) + phase.seconds
    return tuple(PhaseTime(name, total / count) for name, total in totals.items())
