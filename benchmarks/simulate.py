"""What placement reaches in simulation (docs/simulation.md): W8, and traces like Mooncake's on eight workers.

    python -m benchmarks.simulate            # ten minutes on one core
    python -m benchmarks.simulate --quick    # only shows that it all runs

Deterministic: the machine that it runs on changes nothing but how long it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from router.simulation.result import Result
from router.simulation.runs import ORACLE, QUEUED, Case, run

W8_SEEDS, TRACE_SEEDS = 3, 1  # of traces each is an hour
QUICK_REQUESTS = 300


@dataclass(frozen=True, slots=True)
class Table:
    """One case under several policies; rows compare each with cost."""

    name: str
    case: Case
    policies: tuple[str, ...]

    def run(self) -> dict[str, Result]:
        return {policy: run(self.case, policy) for policy in self.policies}


def rows(table: Table, results: dict[str, Result], targets: dict[tuple[str, str], float]) -> Iterator[Row]:
    """`targets`: bounds on the ratio, by metric and opponent; opponent "" is a bound on the number itself."""
    cost = results["cost"]
    numbers: dict[str, Callable[[Result], float]] = {
        "hit rate": lambda r: r.hit_rate,
        "TTFT mean": lambda r: 1e3 * r.ttft.mean,
        "TTFT p90": lambda r: 1e3 * r.ttft.p90,
        "TTFT p95": lambda r: 1e3 * r.ttft.p95,
        "TTFT p99": lambda r: 1e3 * r.ttft.p99,
        "imbalance of prefill": lambda r: r.imbalance,
    }
    for metric, number in numbers.items():
        unit, ours = ("ms" if "TTFT" in metric else ""), number(cost)
        bound = targets.get((metric, ""))
        if bound is not None:
            is_most = metric == "imbalance of prefill"
            said = f"at {'most' if is_most else 'least'} {bound:g}"
            yield Row(table.name, metric, unit, ours, None, "", None, said, ours <= bound if is_most else ours >= bound, 0.0)
        for policy, result in results.items():
            if policy == "cost" or (metric == "imbalance of prefill" and policy == ORACLE):
                continue
            theirs = number(result)
            ratio = ours / theirs if metric == "hit rate" else theirs / ours if ours else None
            least = targets.get((metric, policy))
            said = "" if least is None else f"ratio at least {least:.3g}"
            met = None if least is None or ratio is None else ratio >= least
            yield Row(table.name, metric, unit, ours, theirs, policy, ratio, said, met, 0.0)


def w8_rows(quick: bool) -> Iterator[Row]:
    others = ("cost", ORACLE, "round_robin", QUEUED, "least_loaded", "power_of_two", "random")
    base = Case("w8", num_seeds=1 if quick else W8_SEEDS)
    tables = [
        (Table("caches of 1250", base, others), {("hit rate", ""): 0.64, ("TTFT p99", ORACLE): 1 / 1.05}),
        (Table("twice the rate", replace(base, speed=2.0), others), {("TTFT p99", "round_robin"): 1 / 0.40}),
        (Table("caches of 600", replace(base, blocks=600), others), {("hit rate", ""): 0.55}),
        (Table("caches of 2500", replace(base, blocks=2500), others), {}),
        (Table("2 prefill + 2 decode", replace(base, num_prefill=2), others), {}),
    ]
    for table, targets in tables:
        yield from rows(table, table.run(), targets)


def trace_rows(quick: bool) -> Iterator[Row]:
    others = ("cost", ORACLE, "round_robin") if quick else ("cost", ORACLE, "round_robin", QUEUED)
    for workload in ("conversation", "toolagent"):
        for load in (0.5, 0.8):
            targets = {("hit rate", ORACLE): 0.95, ("imbalance of prefill", ""): 0.10}
            if load == 0.8:
                targets["TTFT p90", "round_robin"] = 3.0
            case = Case(workload, load=load, num_seeds=1 if quick else TRACE_SEEDS, num_requests=QUICK_REQUESTS if quick else None)
            table = Table(f"{workload}, load {load:g}", case, others)
            yield from rows(table, table.run(), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    directory = QUICK_RESULTS if quick else RESULTS
    write("simulate-w8", list(w8_rows(quick)), "make bench-simulate", directory=directory)
    write("simulate-traces", list(trace_rows(quick)), "make bench-simulate", directory=directory)


if __name__ == "__main__":
    main()
