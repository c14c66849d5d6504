"""What a step costs beside the model: `python -m benchmarks.scheduler`. Half a minute; two where vLLM is installed.

A model that takes no time draws the same token for everybody; what is left is scheduling, the arrays a model needs, and taking
the tokens in. Thread time, so that others on the machine do not count. Cases: everybody decodes; sequences end and others,
whose prompts are in the prefix cache or have to be computed, take their places. vLLM's own scheduler, with nothing behind it
either, stands beside the first: its schedule and its update, without the inputs, which its model runner prepares.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.opponents import vllm
from benchmarks.report import QUICK_RESULTS, RESULTS, Row, half_spread, write
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.layout import KvLayout
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.batch import batch_of
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drawing import Drawn, StepTokens
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.runner import Ready
from splitfire.engine.scheduler import Budget, Step
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec

BLOCK_SIZE, PROMPT, CHUNK = 32, 300, 2048
NUM_STEPS, NUM_ROUNDS = 300, 5
COMPARED = 256  # sequences, with vLLM's scheduler
PICO = Path(__file__).resolve().parent.parent / "models" / "pico"  # vLLM's configuration wants a model, of any shape
TOKEN = 7
ROOT = chain_root(b"", b"benchmark", "")
MS = 1e3
now: Callable[[], float] = time.thread_time
_seq_ids = itertools.count()


@dataclass
class Lap:
    """Thread time of one step's parts, seconds."""

    schedule: list[float] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(self.schedule, self.inputs, self.update, strict=True)]


class NoModel:
    """Takes no time: prepares what a model needs and says the same token for all."""

    runs_ahead = False

    def __init__(self, num_blocks: int) -> None:
        self.pool = self
        self.layout = KvLayout("bf16", 1, 1, 8, BLOCK_SIZE)
        self.num_blocks = num_blocks
        self.asked_at = self.prepared_at = self.answered_at = 0.0

    def launch(self, step: Step) -> Ready:
        return Ready(self.run(step))

    def run(self, step: Step) -> StepTokens:
        self.asked_at = now()
        batch_of(step)
        self.prepared_at = now()
        drawn = Drawn((SampledToken(TOKEN, None, ()),))
        slices = {i: drawn for i, piece in enumerate(step.slices) if piece.samples}
        answer = StepTokens(np.full(len(step.decoding), TOKEN), {}, slices)
        self.answered_at = now()
        return answer


def spec(prompt: tuple[int, ...], max_tokens: int) -> SequenceSpec:
    stopping = StopParams(max_tokens, 0, frozenset({0}))
    sampling, names = SamplingParams(temperature=0.0), hash_blocks(ROOT, prompt, BLOCK_SIZE)  # a router sends them along
    return SequenceSpec(SeqId(next(_seq_ids)), prompt, (), 0, sampling, stopping, Purpose.GENERATE, ROOT, names)


class Case:
    """An engine with `num_running` sequences that decode; when one ends, another takes its place."""

    def __init__(self, num_running: int, *, mean_tokens: int | None, is_cached: bool = False) -> None:
        blocks_each = -(-(PROMPT + NUM_STEPS * NUM_ROUNDS + 64) // BLOCK_SIZE) + 1
        num_blocks = num_running * blocks_each
        self.runner = NoModel(num_blocks)
        self.engine = Engine(self.runner, BlockPool(num_blocks), Budget(CHUNK, num_running), lambda: 0.0)  # type: ignore[arg-type]
        self.num_running = num_running
        self.mean_tokens = mean_tokens
        self.is_cached = is_cached
        self.num_added = 0
        for _ in range(num_running):
            self.add()
        for _ in range(200):  # until as many end as begin
            self.engine.step()
            self.refill()

    def add(self) -> None:
        self.num_added += 1
        tokens = NUM_STEPS * NUM_ROUNDS * 2
        if self.mean_tokens is not None:  # spread, so that about as many end in one step as in another
            tokens = self.mean_tokens // 2 + self.num_added * 37 % self.mean_tokens
        # Prompts of different lengths, or all blocks would fill in the same step.
        length = PROMPT - self.num_added % BLOCK_SIZE
        first = 1 if self.is_cached else self.num_added
        self.engine.add(spec((first, *range(2, length + 1)), tokens))

    def refill(self) -> None:
        load = self.engine.load()
        for _ in range(self.num_running - load.waiting - load.running):
            self.add()

    def measure(self, lap: Lap) -> None:
        gc.collect()
        gc.freeze()
        for _ in range(NUM_STEPS):
            began = now()
            self.engine.step()
            ended = now()
            lap.schedule.append(self.runner.asked_at - began)
            lap.inputs.append(self.runner.prepared_at - self.runner.asked_at)
            lap.update.append(ended - self.runner.answered_at)
            self.refill()


def rows_of(case: str, lap: Lap, target_ms: float | None) -> list[Row]:
    total = [seconds * MS for seconds in lap.total()]
    parts = {"schedule": lap.schedule, "inputs": lap.inputs, "update": lap.update}
    rows = []
    for name, values in [("step", total), *((name, [v * MS for v in part]) for name, part in parts.items())]:
        mean = statistics.fmean(values)
        is_judged = name == "step" and target_ms is not None
        target = f"<= {target_ms} ms" if is_judged else ""
        met = mean <= target_ms if is_judged and target_ms is not None else None
        rows.append(Row(case, f"{name}, mean", "ms", mean, None, "", None, target, met, half_spread(values)))
    p99 = statistics.quantiles(total, n=100)[-1]
    rows.append(Row(case, "step, p99", "ms", p99, None, "", None, "", None, 0.0))
    return rows


def vllm_seconds(num_running: int) -> list[float]:
    """Of each step of vLLM's scheduler, in its own environment."""
    script = Path(vllm.__file__).with_name("vllm_scheduler.py")
    command: list[str | Path] = [vllm.PYTHON, "-P", script, PICO, *map(str, (num_running, PROMPT, NUM_STEPS))]
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=True).stdout
    return [float(seconds) for seconds in json.loads(said.splitlines()[-1])]


def beside_vllm(case: str, lap: Lap, theirs: list[float]) -> Row:
    total = [seconds * MS for seconds in lap.total()]
    ours, opponent = statistics.fmean(total), statistics.fmean(theirs) * MS
    return Row(case, "step, mean", "ms", ours, opponent, "vLLM's scheduler", opponent / ours, "", None, half_spread(total))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler")
    parser.add_argument("--quick", action="store_true", help="one round: whether it runs; the result goes to build/results")
    args = parser.parse_args()
    cases: dict[str, tuple[int, int | None, bool]] = {f"{n} decode": (n, None, False) for n in (16, 64, 256, 1024)}
    cases["256 decode, 2 end and 2 cached prompts begin in a step"] = (256, 128, True)
    cases["256 decode, 2 end and 2 prompts of 300 tokens begin in a step"] = (256, 128, False)
    laps = {name: Lap() for name in cases}
    running = {name: Case(n, mean_tokens=mean, is_cached=cached) for name, (n, mean, cached) in cases.items()}
    theirs: list[float] = []
    reason = vllm.why_not()
    for _ in range(1 if args.quick else NUM_ROUNDS):  # interleaved
        for name, case in running.items():
            case.measure(laps[name])
        if not reason:
            theirs += vllm_seconds(COMPARED)
    rows = [beside_vllm(f"{COMPARED} decode", laps[f"{COMPARED} decode"], theirs)] if theirs else []
    for name, lap in laps.items():
        rows += rows_of(name, lap, 0.25 if name.startswith("256") else None)
    write("scheduler", rows, versions={} if reason else vllm.versions(), directory=QUICK_RESULTS if args.quick else RESULTS)


if __name__ == "__main__":
    main()
