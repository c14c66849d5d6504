"""Does the simulator predict our own fleet? One prefill and one decode worker with `smol135` (make checkpoint), requests at random
times, both ways. With a smaller model the messages take longer than the steps, and only those are simulated.

    python -m benchmarks.predict             # ten minutes
    python -m benchmarks.predict --quick     # only shows that it runs

The fleet is measured as `splitfire advise` does, then serves a seeded open-loop load, several times; the simulator serves the same
arrivals. A prediction is right within 10 %, or within what two runs of the fleet differ by: medians of all turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from benchmarks.router.rig import ROOT
from benchmarks.serve.fleets import SPLIT, cores_of, fleet
from router.simulation.advice import Mix, capacity, poisson
from router.simulation.engine import Engine
from router.simulation.fleet import Setup, simulate
from router.simulation.profile import read_profile
from router.simulation.result import result_of
from splitfire.cli.advise import Answer, measure, save, stream
from splitfire.cli.client import Client
from splitfire.core.workload_trace import Trace

CHECKPOINT = ROOT / "build" / "checkpoints" / "smol135"
MIX = Mix(num_prompt=300, num_output=40)
LOADS = (0.15, 0.3)  # of what both workers could do without splitting; router and client need the rest of the processors
TURNS = 3
MAX_STREAMS = 64
MOST_SPREAD = 0.5  # of what was measured; beyond, the machine has other things to do
FIRST_ORDINARY_ID = 16


@dataclass(frozen=True, slots=True)
class Numbers:
    """Seconds."""

    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    itl_mean: float


def served(client: Client, trace: Trace, vocab_size: int, seed: int) -> Numbers:
    """By the fleet, each request at its moment whatever became of those before."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(a.num_tokens)] for a in trace.arrivals]
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        began = time.monotonic()
        pending = []
        for arrival, prompt in zip(trace.arrivals, prompts, strict=True):
            time.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
            pending.append(pool.submit(stream, client, prompt, arrival.num_output))
        answers = [one.result() for one in pending]
    return numbers([answer.token_times[0] - answer.sent_at for answer in answers], [itl for a in answers if (itl := itl_of(a))])


def itl_of(answer: Answer) -> float:
    """Mean gap between two tokens."""
    times = answer.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def numbers(ttfts: Sequence[float], itls: Sequence[float]) -> Numbers:
    tenths = statistics.quantiles(ttfts, n=10, method="inclusive")
    return Numbers(statistics.fmean(ttfts), tenths[4], tenths[8], statistics.fmean(itls))


def measured(client: Client) -> Engine:
    """The fleet as it is now."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "profile.json"
        save(measure(client), path)
        return read_profile(path).engine()


def arrivals_at(client: Client, rate: float, num_requests: int) -> Trace:
    """So many a second, of MIX, at random times: those that fit the model's context."""
    trace = poisson(MIX, rate, num_requests, client.fleet().workers[0].block_size, seed=1)
    most = client.model().context_length
    return replace(trace, arrivals=[a for a in trace.arrivals if a.num_tokens + a.num_output <= most])


def predicted(engine: Engine, trace: Trace) -> Numbers:
    result = result_of(simulate(trace, Setup(engine, 1, 1, split="always")))
    return Numbers(result.ttft.mean, result.ttft.p50, result.ttft.p90, result.tpot.mean)


def rows(load: float, runs: Sequence[Numbers], simulated: Sequence[Numbers]) -> list[Row]:
    found = []
    for metric, name in (("TTFT p50", "ttft_p50"), ("TTFT p90", "ttft_p90"), ("ITL mean", "itl_mean")):
        values = [1e3 * getattr(run, name) for run in runs]
        ours, real = 1e3 * statistics.median(getattr(one, name) for one in simulated), statistics.median(values)
        spread = max(values) - min(values)
        is_noisy = spread > MOST_SPREAD * real
        met = None if is_noisy else abs(ours - real) <= max(0.1 * real, spread)
        target = "runs differ too much" if is_noisy else "within 10 % or the spread of runs"
        found.append(Row(f"load {load:g}", metric, "ms", ours, real, "measured", real / ours, target, met, spread))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    turns, num_requests = (1, 20) if quick else (TURNS, 100)
    found: list[Row] = []
    with fleet(str(CHECKPOINT), cores_of(SPLIT, (0, 1)), ()) as started, started.client() as client:
        vocab_size = client.model().vocab_size
        for load in LOADS:
            trace = arrivals_at(client, load * capacity(measured(client), 2, MIX), num_requests)
            runs, simulated = list[Numbers](), list[Numbers]()
            for turn in range(turns):  # measured each time: this machine is not the same for long
                simulated.append(predicted(measured(client), trace))
                runs.append(served(client, trace, vocab_size, turn))
            found += rows(load, runs, simulated)
    write("simulate-predict", found, "python -m benchmarks.predict", directory=QUICK_RESULTS if quick else RESULTS)


if __name__ == "__main__":
    main()
