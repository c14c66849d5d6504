"""What the rows say, in a sentence or two. Pure. A difference is told only when it is more than chance and rounds explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from splitfire.cli.bench.numbers import per_second, rate_list, seconds, sent
from splitfire.cli.bench.statistics import Row

SPLIT, AGGREGATED = "split", "aggregated"
IN_TIME = 0.9  # of the requests: the load that a fleet carries is the greatest at which so many are in time
IS_MORE = 1.05  # of goodputs
IS_OTHER = 1.1  # of percentiles
SIGMAS = 2.0
FEWEST = 20  # requests answered that a percentile is taken seriously of


def sentences(rows: Sequence[Row]) -> list[str]:
    """One on each variant."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    return [_alone(variant, [row for row in rows if row.variant == variant]) for variant in variants]


def carried_rate(rows: Sequence[Row]) -> float | None:
    """The greatest rate at which, as at all smaller ones, IN_TIME of the requests met both targets."""
    carried = None
    for row in sorted(rows, key=lambda row: row.rate):
        if row.share_met < IN_TIME:
            break
        carried = row.rate
    return carried


def pairs_of(rows: Sequence[Row], one: str, other: str) -> list[tuple[Row, Row]]:
    """Rows of two variants at the same rate, by rate, as far as they are complete."""
    whole = [row for row in rows if not row.is_cut]
    by_rate = {row.rate: row for row in whole if row.variant == other}
    return [(row, by_rate[row.rate]) for row in whole if row.variant == one and row.rate in by_rate]


def comparison(rows: Sequence[Row]) -> str:
    """Where split wins and where it loses beside aggregated, by goodput, TTFT p90 and ITL p99; empty when they have no rate in common."""
    pairs = pairs_of(rows, SPLIT, AGGREGATED)
    if not pairs:
        return ""
    parts = [
        *_sides(pairs, "goodput", _more_goodput, lambda row: row.goodput, per_second),
        *_sides(pairs, "TTFT p90", _less_ttft, lambda row: row.ttft.p90 if row.ttft else math.nan, seconds),
        *_sides(pairs, "ITL p99", _less_itl, lambda row: row.itl.p99 if row.itl else math.nan, seconds),
    ]
    wins, losses = [text for is_win, text in parts if is_win], [text for is_win, text in parts if not is_win]
    if not parts:
        return f"Split and aggregated differ by no more than chance, at {rate_list([row.rate for row, _ in pairs])} requests/s."
    won, lost = _listed(wins) or "nowhere", _listed(losses) or "nowhere"
    return f"Split wins {won}; it loses {lost}."


def _alone(variant: str, rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: row.goodput)
    carried = carried_rate(rows)
    if not best.goodput:
        return f"{variant.capitalize()}: no request met both targets at any rate."
    peak = f"most in time at {sent(best.rate)}: {per_second(best.goodput)}"
    if carried is None:
        return f"{variant.capitalize()}: under {IN_TIME:.0%} in time at every rate; {peak}."
    more = " or more" if carried == rows[-1].rate else ""
    return f"{variant.capitalize()}: {IN_TIME:.0%} or more of the requests in time up to {sent(carried)}{more}; {peak}."


Better = Callable[[Row, Row], bool]


def _sides(
    pairs: Sequence[tuple[Row, Row]], name: str, is_better: Better, value: Callable[[Row], float], show: Callable[[float], str]
) -> list[tuple[bool, str]]:
    """Whether the first wins, and how to say it; nothing where neither does."""
    found = []
    for is_win in (True, False):
        best = [(a, b) for a, b in pairs if (is_better(a, b) if is_win else is_better(b, a))]
        if best:
            a, b = max(best, key=lambda pair: abs(math.log((value(pair[0]) or 1e-9) / (value(pair[1]) or 1e-9))))
            most = f", at {a.rate:g}" if len(best) > 1 else ""
            where = _where([row.rate for row, _ in best], [row.rate for row, _ in pairs])
            found.append((is_win, f"in {name} {where} ({show(value(a))} against {show(value(b))}{most})"))
    return found


def _where(some: Sequence[float], rates: Sequence[float]) -> str:
    """At which of the rates."""
    if len(some) == len(rates) > 1:
        return "at every rate"
    if len(some) > 1 and list(some) == list(rates[-len(some) :]):
        return f"from {sent(some[0])} on"
    if len(some) > 1 and list(some) == list(rates[: len(some)]):
        return f"up to {sent(some[-1])}"
    return f"at {rate_list(some)} requests/s" if len(some) > 1 else f"at {sent(some[0])}"


def _more_goodput(a: Row, b: Row) -> bool:
    """In every round more than the other in any, and more than two draws of so many requests differ by."""
    if not a.num_requests or not b.num_requests or a.goodput < IS_MORE * b.goodput or min(a.goodputs) <= max(b.goodputs):
        return False
    both = (a.num_met + b.num_met) / (a.num_requests + b.num_requests)
    error = math.sqrt(both * (1 - both) * (1 / a.num_requests + 1 / b.num_requests))
    return a.share_met - b.share_met > SIGMAS * error


def _less_ttft(a: Row, b: Row) -> bool:
    return _are_enough(a, b) and _is_less(a.ttft_p90s, b.ttft_p90s)


def _less_itl(a: Row, b: Row) -> bool:
    return _are_enough(a, b) and _is_less(a.itl_p99s, b.itl_p99s)


def _are_enough(a: Row, b: Row) -> bool:
    """Whoever refuses those who would wait longest has the shortest times: where many failed, percentiles say nothing."""
    return all(row.num_requests - row.num_errors >= max(FEWEST, IN_TIME * row.num_requests) for row in (a, b))


def _is_less(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """In every round of mine less than in any of theirs, and by IS_OTHER in the mean."""
    if not mine or not theirs or max(mine) >= min(theirs):
        return False
    return sum(mine) / len(mine) * IS_OTHER <= sum(theirs) / len(theirs)


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    if late := [row for row in rows if row.is_late]:
        where = "everywhere" if len(late) == len(rows) > 1 else f"in {len(late)} of {len(rows)} lines ({_places(late)})"
        found.append(
            f"The client was late {where}: its own delays are a part of the times. Give it a processor of its own, or another machine."
        )
    if wrong := [row for row in rows if row.num_errors]:
        found.append(
            f"Not every request was answered ({_places(wrong)}); they count as not in time, and the table has the reasons."
        )
    if cut := [row for row in rows if row.is_cut]:
        found.append(f"Ended before its time: {_places(cut)} counts as far as it went.")
    return found


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def error_lines(rows: Sequence[Row]) -> list[str]:
    """Each reason, where it came."""
    return [
        f"{row.variant} at {row.rate:g}: {', '.join(f'{count} {reason}' for reason, count in row.errors.items())}"
        for row in rows
        if row.errors
    ]


def _places(rows: Sequence[Row]) -> str:
    by_variant: dict[str, list[float]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, []).append(row.rate)
    return ", ".join(f"{variant} at {rate_list(rates)}" for variant, rates in by_variant.items())
