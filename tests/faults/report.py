"""`make fault-report`: what clients see while workers of a real fleet are killed and frozen again and again.

Eight clients ask a hundred requests each of `splitfire up pico`, whose supervisor starts again whoever died. One calm run says which
tokens are right and how long a client waits without any fault; then each fault has a fleet of its own, and comes again as soon as the
fleet is whole. Written to benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import until
from tests.faults.proc.clients import Clients, Outcome, requests_of
from tests.faults.proc.up import Up, up

NUM_CLIENTS = 8
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
CALM_S = 2.0  # before a fault: what throughput is measured against
WINDOW_S, SHARE = 0.5, 0.8  # throughput is back when half a second brings so much of that again
FROZEN_S = 15.0  # longer than a worker may be silent
ENVIRONMENT = {"SPLITFIRE_PREFIX_CACHE": "false"}  # every prompt is computed and moved, or there is little to lose


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to whom; `published` is the best that is known of others, lost of 800 requests."""

    name: str
    victims: tuple[str, ...]  # in turn
    number: signal.Signals
    decode: int = 2
    routers: int = 1
    is_survivable: bool = True  # somebody else can do all of the victim's work
    most_tries: int = 100
    published: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the report. Recovery: the longest that any client saw nothing, and until throughput was back."""

    fault: Fault
    tries: int
    num_requests: int
    wrong_tokens: int
    lost: int
    silent: int  # of the lost: not told to come again, or not that the answer is incomplete; nobody can tell when a router died
    longest_gap_s: float
    throughput_back_s: float
    reasons: str  # of what was lost, and how often


PREFILLS, DECODES = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
FAULTS = (
    Fault("kill -9 a prefill worker", PREFILLS, signal.SIGKILL, published=4),
    Fault("kill -9 a decode worker", DECODES, signal.SIGKILL, published=4),
    Fault("freeze a prefill worker", PREFILLS, signal.SIGSTOP),
    Fault("freeze a decode worker", DECODES, signal.SIGSTOP),
    Fault("restart every worker in turn", (*PREFILLS, *DECODES), signal.SIGTERM),
    Fault("kill -9 one of two routers", ("router-0", "router-1"), signal.SIGKILL, routers=2, is_survivable=False),
    Fault(
        "kill -9 the only decode worker", ("decode-0",), signal.SIGKILL, decode=1, is_survivable=False, most_tries=1, published=280
    ),
)
PUBLISHED_RECOVERY_S = 38.0


def torment(fleet: Up, fault: Fault, clients: Clients) -> list[float]:
    """Hurts one victim after the other, each time when the fleet is whole, until the clients are done. When it did."""
    times: list[float] = []
    time.sleep(CALM_S)
    while not clients.are_over and len(times) < fault.most_tries:
        victim = fault.victims[len(times) % len(fault.victims)]
        process = fleet.child(victim)
        assert process is not None
        times.append(time.monotonic())
        process.send_signal(fault.number)
        if fault.number is signal.SIGSTOP:
            _wait(FROZEN_S, clients)
            process.resume()
        else:
            until(partial(fleet.has_other, victim, process), 90)
        fleet.wait_whole()
        _wait(CALM_S, clients)
    return times


def _wait(seconds: float, clients: Clients) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not clients.are_over:
        time.sleep(0.05)


def throughput_back_s(outcomes: Sequence[Outcome], fault_at: float, others: Sequence[float]) -> float:
    """From the fault to the beginning of the first window with enough tokens; at most until the next fault or the end."""
    arrivals = [a for o in outcomes for a in o.arrivals]

    def rate(since: float, seconds: float) -> float:
        return sum(a.num_tokens for a in arrivals if since <= a.at < since + seconds) / seconds

    calm = rate(fault_at - CALM_S, CALM_S)
    end = min([t for t in others if t > fault_at] + [max(a.at for a in arrivals)])
    at = fault_at
    while at + WINDOW_S < end and rate(at, WINDOW_S) < SHARE * calm:
        at += 0.05
    return at - fault_at


def measure(fault: Fault, requests: Sequence[pb.GenerateRequest], expected: Sequence[tuple[int, ...]]) -> Measured:
    flags = (f"--routers={fault.routers}",) if fault.routers > 1 else ()
    with up(2, fault.decode, *flags, environment=ENVIRONMENT) as fleet:
        clients = Clients([fleet.stub() for _ in range(NUM_CLIENTS)], requests)
        times = torment(fleet, fault, clients)
        outcomes = clients.join()
        fleet.wait_whole()
        until(fleet.is_quiet, 20)
    wrong = sum(_wrong_tokens(o, expected[o.number]) for o in outcomes)
    lost = [o for o in outcomes if o.refusal is not None]
    backs = [throughput_back_s(outcomes, t, times) for t in times]
    return Measured(
        fault, len(times), len(requests), wrong, len(lost), sum(map(_is_silent, lost)) if fault.routers == 1 else 0,
        max(o.longest_gap_s for o in outcomes), max(backs, default=0.0), _reasons_of(lost),
    )  # fmt: skip


def _reasons_of(lost: Sequence[Outcome]) -> str:
    """A refusal without a reason is of gRPC itself: nobody was there to say more."""
    counts = Counter(
        f"{o.refusal.reason or o.refusal.code.name}{' in mid answer' if o.ids else ''}" for o in lost if o.refusal is not None
    )
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _wrong_tokens(outcome: Outcome, expected: tuple[int, ...]) -> int:
    """What was streamed must begin the right answer, all of it if it ended well; a broken stream has nothing right."""
    if not outcome.is_contiguous:
        return len(expected)
    missing = len(expected) - len(outcome.ids) if outcome.refusal is None else 0
    return missing + sum(got != right for got, right in zip(outcome.ids, expected, strict=False))


def _is_silent(outcome: Outcome) -> bool:
    refusal = outcome.refusal
    assert refusal is not None
    is_flagged = not outcome.ids or refusal.metadata.get("incomplete") == "true"
    return not (refusal.is_retryable and refusal.reason and is_flagged)


def calm_run(requests: Sequence[pb.GenerateRequest]) -> tuple[list[tuple[int, ...]], float]:
    """The right answers, and the longest that a client saw nothing though nothing happened."""
    with up(2, 2, environment=ENVIRONMENT) as fleet:
        outcomes = Clients([fleet.stub() for _ in range(NUM_CLIENTS)], requests).join()
    assert all(o.refusal is None and o.is_contiguous for o in outcomes)
    return [o.ids for o in outcomes], max(o.longest_gap_s for o in outcomes)


def rows_of(found: Sequence[Measured], calm_gap_s: float) -> list[Row]:
    rows = [Row("no fault", "longest gap a client saw", "s", calm_gap_s, None, "", None, "", None, 0.0)]
    for m in found:
        name, survivable = m.fault.name, m.fault.is_survivable
        published = m.fault.published
        recovery = PUBLISHED_RECOVERY_S if published else None
        rows += [
            _row(name, f"faults during {m.num_requests} requests", m.tries),
            _row(name, "wrong tokens", m.wrong_tokens, most=0),
            _row(name, "lost requests", m.lost, most=0 if survivable else None, published=published),
            _row(name, "lost without an honest error", m.silent, most=0),
            _row(name, "longest gap a client saw", m.longest_gap_s, "s", most=2.0 if survivable else None, published=recovery),
            _row(name, "until throughput is back", m.throughput_back_s, "s", most=2.0 if survivable else None, published=recovery),
        ]
    return rows


def _row(case: str, metric: str, ours: float, unit: str = "", *, most: float | None = None, published: float | None = None) -> Row:
    target = "" if most is None else "0" if most == 0 else f"under {most:g}"
    met = None if most is None else ours <= most
    ratio = published / ours if published is not None and ours else None
    return Row(case, metric, unit, ours, published, "published" if published is not None else "", ratio, target, met, 0.0)


def print_table(found: Sequence[Measured]) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("fault", "tries", "wrong tokens", "lost requests", "longest gap", "throughput back", "told"):
        table.add_column(title, justify="left" if title in ("fault", "told") else "right")
    for m in found:
        lost = f"{m.lost} of {m.num_requests}"
        gap, back = f"{m.longest_gap_s:.2f} s", f"{m.throughput_back_s:.2f} s"
        table.add_row(m.fault.name, str(m.tries), str(m.wrong_tokens), lost, gap, back, m.reasons)
    Console(width=160).print(table)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--requests", type=int, default=100, help="of each client")
    parser.add_argument("--only", default="", help="faults whose name has this in it; nothing is kept")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that fleets are ended too
    requests = requests_of(NUM_CLIENTS * args.requests, PROMPT_TOKENS, OUTPUT_TOKENS)
    expected, calm_gap_s = calm_run(requests)
    found: list[Measured] = []
    say: Callable[[str], None] = Console(stderr=True).print
    for fault in (f for f in FAULTS if args.only in f.name):
        say(f"{fault.name} ...")
        found.append(measure(fault, requests, expected))
    is_whole_report = args.requests == 100 and not args.only
    command = " ".join(["python -m tests.faults.report", *argv])
    write("faults", rows_of(found, calm_gap_s), command, directory=RESULTS if is_whole_report else QUICK_RESULTS)
    print_table(found)
    return 1 if any(m.wrong_tokens or m.silent or (m.lost and m.fault.is_survivable) for m in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
