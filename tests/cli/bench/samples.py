"""Outcomes, runs and reports made by hand or by formula."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from splitfire.cli.bench.flags import Slo
from splitfire.cli.bench.results import Results
from splitfire.cli.bench.statistics import Cell, Client, Outcome, PhaseTime, rows_of
from splitfire.cli.bench.verdict import comparison, sentences, warnings

SLO = Slo(0.5, 0.05)


def outcome(ttft_s: float = 0.1, itl_s: float = 0.01, *, num_gaps: int = 4, due_s: float = 1.0, late_s: float = 0.0) -> Outcome:
    return Outcome(due_s, late_s, 100, 0, num_gaps + 1, ttft_s, [itl_s] * num_gaps)


def failed(reason: str) -> Outcome:
    return Outcome(1.0, 0.0, 100, error=reason)


def cell(outcomes: list[Outcome], variant: str = "split", rate: float = 2.0, turn: int = 0, **changes: object) -> Cell:
    fields: dict[str, object] = {"begin_s": 1.0, "duration_s": len(outcomes) / rate, "client": Client((0.001,), 0.1)}
    return Cell(variant, rate, turn, outcomes=outcomes, **{**fields, **changes})  # type: ignore[arg-type]


def results(cells: list[Cell], model: str = "pico", **changes: object) -> Results:
    rows = rows_of(cells, SLO)
    head = {"command": "splitfire bench serve", "machine": "a machine"}
    fields = {"sentences": sentences(rows), "comparison": comparison(rows), "warnings": warnings(rows), "notes": ()}
    return Results(**{"model": model, "head": head, "slo": SLO, "rows": rows, **fields, **changes})  # type: ignore[arg-type]


Load = Callable[[Random, float], Outcome]


def split(random: Random, load: float) -> Outcome:
    """`load` is 1 where it carries no more: waiting for prompts grows, steps stay as short as they are."""
    wait = random.expovariate(1 / (0.03 + 0.05 * load**4))
    phases = (("admit", 0.4 * wait), ("place", 0.001), ("wait_prefill", 0.6 * wait), ("prefill", 0.06), ("transit", 0.002))
    gaps = [random.lognormvariate(-5.9, 0.3) for _ in range(63)]
    return Outcome(1.0, 0.0005, 300, 0, 64, 0.063 + wait, gaps, phases=tuple(PhaseTime(name, seconds) for name, seconds in phases))


def aggregated(random: Random, load: float) -> Outcome:
    """Waits less, and steps are long when prompts are computed beside them."""
    wait = random.expovariate(1 / (0.03 + 0.03 * load**4))
    gaps = [random.lognormvariate(-5.9, 0.3) * (12 if random.random() < 0.1 * load else 1) for _ in range(63)]
    return Outcome(1.0, 0.0005, 300, 0, 64, 0.065 + wait, gaps, phases=(PhaseTime("admit", wait), PhaseTime("prefill", 0.065)))


def sweep(rates: tuple[float, ...] = (1, 2, 4, 8, 16, 32), rounds: int = 2, num: int = 60) -> list[Cell]:
    """Both variants, rates up to twice of what they carry."""
    random = Random(0)
    return [
        cell([load(random, rate / 14) for _ in range(num)], name, rate, turn)
        for turn in range(rounds)
        for name, load in (("split", split), ("aggregated", aggregated))
        for rate in rates
    ]
