"""Four times what the workers can do, for a minute; and a thousand streams cancelled at once.

The fake prefill workers take a millisecond for a token of a prompt. Goodput counts answers whose first token
came within the target; peak is what a closed loop gets out of the same workers.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence

from benchmarks.report import Row
from benchmarks.router.engine import Speed
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Answer, Ask
from benchmarks.router.rig import rig, wait_until_quiet
from benchmarks.router.runs import at_least, at_most, plain

SLOW = FleetShape(2, 2, Speed(token_s=0.001, step_s=0.01))
ASK = Ask(300, 0, 8, timeout_s=30.0)
TARGET_S = 2.0
PEAK_STREAMS = 16  # keep the workers busy, and nobody waits for long enough to be refused
FLAGS = ("--split=always", f"--ttft-target-s={TARGET_S}", "--max-requests=1024")
STEPPING = FleetShape(2, 2, Speed(step_s=0.1))
NUM_CANCELLED, NUM_SURVIVORS = 1000, 32
CANCEL_WITHIN_S = 0.1


def overload(_turns: int, seconds: float) -> list[Row]:
    """`seconds` is a fifteenth of the overload's time."""
    with rig(SLOW, FLAGS) as made:
        made.all("closed", ASK, PEAK_STREAMS, seconds)  # the router learns what a prompt takes
        peak = _goodput(made.all("closed", ASK, PEAK_STREAMS, 2 * seconds), 2 * seconds)
        lasting_s = 15 * seconds
        answers = made.all("opened", ASK, _poisson(4 * peak, lasting_s))
        over = time.perf_counter()
        after = made.all("opened", ASK, _poisson(0.5 * peak, max(12.0, 2 * seconds)))
        wait_until_quiet(made, 20.0)
    ttft = sorted(a.ttft_s for a in answers if a.at and not a.error)
    refused = sorted(1e3 * (a.ended - a.sent) for a in answers if a.error and not a.at)
    case = f"4x for {lasting_s:g} s"
    return [
        at_least(case, "goodput beside peak", "", [_goodput(answers, lasting_s) / peak], 0.9),
        at_most(case, "accepted TTFT p99", "ms", [1e3 * ttft[len(ttft) * 99 // 100]], 1e3 * TARGET_S),
        at_most(case, "refusals p99", "ms", [refused[len(refused) * 99 // 100] if refused else 0.0], 50),
        plain(case, "refused", "%", [100 * len(refused) / len(answers)]),
        plain(case, "broken off after they began", "%", [100 * sum(bool(a.error and a.at) for a in answers) / len(answers)]),
        at_most("then at half of it", "recovery", "s", [_recovery_s(after, over)], 10),
    ]


def cancels(_turns: int, seconds: float) -> list[Row]:
    """Survivors' gaps in the `2 * seconds` from the first cancel on, beside those before it."""
    watched_s = 2 * seconds
    with rig(STEPPING, ("--max-requests=4096",), num_clients=2) as made:
        survivors, others = made.clients
        survivors.begin("closed", Ask(0, 20, int(10 * (2 * watched_s + 8))), NUM_SURVIVORS, 0.001, 0)
        begun = time.perf_counter()
        took_s = []
        cancelling = threading.Thread(
            target=lambda: took_s.append(others.do("cancelled", Ask(0, 20, 4000), NUM_CANCELLED, CANCEL_WITHIN_S, watched_s, 1))
        )
        cancelling.start()
        cancelling.join()
        cancelled_at = time.perf_counter() - took_s[0]
        answers: list[Answer] = survivors.result()
        quiet_s = wait_until_quiet(made, 10.0)
    before = _gaps(answers, cancelled_at - watched_s, cancelled_at)
    since = _gaps(answers, cancelled_at, cancelled_at + watched_s)
    assert begun < cancelled_at - watched_s
    p99 = [1e3 * gaps[len(gaps) * 99 // 100] for gaps in (before, since)]
    case = f"{NUM_CANCELLED} cancels in {1e3 * took_s[0]:.0f} ms, {NUM_SURVIVORS} streams stay"
    return [
        plain(case, "survivors' ITL p99 before", "ms", [p99[0]]),
        plain(case, "survivors' ITL p99 since", "ms", [p99[1]]),
        at_most(case, "ratio of the two", "", [p99[1] / p99[0]], 2),
        plain(case, "longest gap since", "ms", [1e3 * since[-1]]),
        plain("afterwards", "time until nothing is open, at router and workers", "s", [quiet_s]),
    ]


def _goodput(answers: Sequence[Answer], seconds: float) -> float:
    good = [a for a in answers if a.at and not a.error and a.ttft_s <= TARGET_S]
    return len(good) / seconds


def _poisson(rate: float, seconds: float) -> list[float]:
    draw, at, instants = random.Random(0), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        instants.append(at)
    return instants


def _recovery_s(answers: Sequence[Answer], over: float) -> float:
    """From the end of the overload until the first second in which nobody is refused and TTFT is what it is at the end."""
    usual = statistics.median(a.ttft_s for a in answers[-len(answers) // 4 :] if a.at)
    bad = [a.sent for a in answers if a.error or a.ttft_s > max(4 * usual, 0.2)]
    return max(bad, default=over) - over


def _gaps(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    return sorted(b - a for answer in answers for a, b in zip(answer.at, answer.at[1:], strict=False) if begin <= b < end)
