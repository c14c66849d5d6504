"""What a hand-off adds to a request, as its client sees it: token 2 after token 1, split on one GPU and aggregated, in turn.

The checkpoint has the KV of Llama-3.1-8B, 1074 MB of 8192 tokens, and small matrices. That makes it harder, not easier: the prompt is
computed in a fraction of the time, so less of the hand-off hides behind its chunks, and a step takes next to none of what comes after
token 1, so the rest hides behind nothing. Two processes take turns on one GPU, but nothing here computes while the other one does.
"""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from benchmarks.report import Row, half_spread
from benchmarks.serve.answers import Answer
from benchmarks.serve.endpoints import GrpcEndpoint, ask, random_prompt
from benchmarks.serve.fleets import AGGREGATED, SPLIT, Cores, fleet, vocab_size
from splitfire.cli.supervisor import default_cpus

MOST_MS = 10.0
MIB = 1 << 20
BUILTIN = "pico"


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What to start, and what to ask it."""

    shape: str  # of make_checkpoint; empty: the model that comes with us
    flags: tuple[str, ...]  # of every worker
    slot_sizes: tuple[int, ...]  # a split fleet for each
    num_prompt: int  # tokens
    num_turns: int
    limit_s: int  # of one comparison, starting and stopping included
    is_dry: bool


FULL_FLEETS = FleetPlan(
    "kv8b", ("--device=cuda", "--kv-memory=3GiB", "--speculate=off"), (4 * MIB, 64 * MIB), 8192, 5, limit_s=150, is_dry=False
)
DRY_FLEETS = FleetPlan("", ("--threads=1", "--speculate=off"), (4 * MIB,), 500, 2, limit_s=60, is_dry=True)


def exposed_rows(plan: FleetPlan) -> list[Row]:
    """Rows for each size of slots. A fleet that fails is a row that is not met."""
    found: list[Row] = []
    for size in plan.slot_sizes:
        case = f"exposed, {plan.num_prompt} tokens, --slot-size {size // 1024}KiB"
        try:
            with time_limit(plan.limit_s):
                found += compare(case, plan, size)
        except Exception as exc:  # whatever a fleet may die of, the other rows are worth their time
            found.append(failed(case, f"{type(exc).__name__}: {exc}"))
    return found


def failed(case: str, reason: str) -> Row:
    return Row(case, reason[:400], "", 0.0, None, "", None, "runs", False, 0.0)


def compare(case: str, plan: FleetPlan, slot_size: int) -> list[Row]:
    """Both fleets are up for the whole of it; prompts differ, so that nothing is cached."""
    model = made(plan.shape) if plan.shape else BUILTIN
    prefill, decode = default_cpus(1, 1)
    flags = [*plan.flags, f"--slot-size={slot_size}"]
    answers: dict[str, list[Answer]] = {SPLIT: [], AGGREGATED: []}
    draw, vocab = random.Random(1), vocab_size(model)
    with fleet(model, Cores(prefill, decode), flags) as split, fleet(model, Cores((), decode), flags) as whole:
        endpoints = {SPLIT: GrpcEndpoint(split.address), AGGREGATED: GrpcEndpoint(whole.address)}
        for turn in range(-2, plan.num_turns):  # two to warm up
            for kind, endpoint in endpoints.items():
                answer = ask(endpoint, random_prompt(draw, plan.num_prompt, vocab), 4)
                if turn >= 0:
                    answers[kind].append(answer)
    assert all(x.kv_bytes for x in answers[SPLIT])
    assert not any(x.kv_bytes for x in answers[AGGREGATED])
    return rows_of(case, answers[SPLIT], answers[AGGREGATED], is_dry=plan.is_dry)


def made(shape: str) -> str:
    """Its directory."""
    from benchmarks.make_checkpoint import make  # noqa: PLC0415  transformers: 3 s that a dry run does not have

    return str(make(shape))


def rows_of(case: str, split: Sequence[Answer], whole: Sequence[Answer], *, is_dry: bool) -> list[Row]:
    """Exposed is the median of what neighbours in time differ by."""
    times = {
        "TTFT": ([x.ttft_s * 1e3 for x in split], [x.ttft_s * 1e3 for x in whole]),
        "token 2 after token 1": ([x.second_gap_s * 1e3 for x in split], [x.second_gap_s * 1e3 for x in whole]),
    }
    found = []
    for metric, (ours, theirs) in times.items():
        mine, other = statistics.median(ours), statistics.median(theirs)
        found.append(Row(case, f"{metric}, p50", "ms", mine, other, AGGREGATED, other / mine, "reported", None, half_spread(ours)))
    added = [a.second_gap_s * 1e3 - b.second_gap_s * 1e3 for a, b in zip(split, whole, strict=True)]
    exposed = statistics.median(added)
    target, met = f"at most {MOST_MS:g} ms", None if is_dry else exposed <= MOST_MS
    return [*found, Row(case, "added to token 2, p50", "ms", exposed, None, "", None, target, met, half_spread(added))]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError within; main thread only. A fleet by itself waits half an hour for a model to load."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
