"""`python -m benchmarks.router [CASE...] [--quick]`. Each case starts what it measures, and writes results/router-CASE.json.

added       time to first token with instant workers, alone and beside 64 streams
requests    requests a second of 300 bytes of text
relay       messages and tokens a second
processes   processor time a request with two router processes
cost        processor time a request beside sglang-router and vllm-router, and what ours is made of
overload    four times what the workers can do
cancels     1000 streams cancelled in 100 ms
w8          the routing workload, beside sglang-router and Dynamo
http        what HTTP adds to gRPC's first token, and how much it relays beside it
accounts    phases of 1000 requests beside the router's own time to the first token, and that beside the client's; real workers
telemetry   throughput with metrics, traces, and a collector that is down, beside none; real workers
head        a short prompt behind ten long ones that were cancelled, with real workers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from benchmarks.router import dynamo, others, speed
from benchmarks.router.accounts import accounts, telemetry
from benchmarks.router.cost import cost
from benchmarks.router.head import head
from benchmarks.router.http import http
from benchmarks.router.overload import cancels, overload
from benchmarks.router.w8 import w8

Case = Callable[[int, float], list[Row]]
CASES: dict[str, Case] = {
    "added": speed.added,
    "requests": speed.requests,
    "relay": speed.relay,
    "processes": speed.processes,
    "cost": cost,
    "overload": overload,
    "cancels": cancels,
    "w8": w8,
    "http": http,
    "accounts": accounts,
    "telemetry": telemetry,
    "head": head,
}
TURNS, SECONDS = 5, 4.0
QUICK_TURNS, QUICK_SECONDS = 1, 0.4


def run(case: str, *, is_quick: bool) -> Path:
    """Measures and writes it."""
    rows = CASES[case](QUICK_TURNS, QUICK_SECONDS) if is_quick else CASES[case](TURNS, SECONDS)
    flags = " --quick" if is_quick else ""
    directory = QUICK_RESULTS if is_quick else RESULTS
    versions = {**others.versions(), **dynamo.versions()} if case in ("cost", "w8") else {}
    return write(f"router-{case}", rows, f"python -m benchmarks.router {case}{flags}", versions, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="only shows that it all runs; nothing is kept")
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in CASES]:
        parser.error(f"no case is called {', '.join(unknown)}: {', '.join(CASES)}")
    for case in args.cases or CASES:
        run(case, is_quick=args.quick)


if __name__ == "__main__":
    main()
