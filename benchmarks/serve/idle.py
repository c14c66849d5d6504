"""What a fleet costs that has nothing to do: processor time of all its processes, and the memory of each."""

from __future__ import annotations

import argparse
import random
import time

import psutil

from benchmarks.report import Row
from benchmarks.serve.endpoints import GrpcEndpoint, ask, random_prompt
from benchmarks.serve.fleets import SPLIT, cores_of, fleet, vocab_size


def idle(args: argparse.Namespace) -> list[Row]:
    """Processor time of a fleet that has nothing to do, and the resident memory of each process."""
    rows = []
    with fleet(args.model, cores_of(SPLIT, args.cpus), args.flag) as running:
        ask(GrpcEndpoint(running.address), random_prompt(random.Random(1), 256, vocab_size(args.model)), 32)
        processes = [(c.name, psutil.Process(c.process.pid)) for c in running.children if c.process is not None]
        everybody = [p for _, top in processes for p in (top, *top.children(recursive=True))]
        time.sleep(3)
        before, began = sum(_cpu(p) for p in everybody), time.perf_counter()
        time.sleep(args.seconds)
        share = (sum(_cpu(p) for p in everybody) - before) / (time.perf_counter() - began) * 100
        rows.append(Row("idle fleet", "processor", "% of a core", share, None, "", None, "under 3 % of a core", share < 3, 0.0))
        for name, top in processes:
            for process in (top, *top.children(recursive=True)):
                label = name if process is top else f"{name}, tokenizer process"
                megabytes = process.memory_info().rss / 1e6
                rows.append(Row(label, "resident memory", "MB", megabytes, None, "", None, "", None, 0.0))
    return rows


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
