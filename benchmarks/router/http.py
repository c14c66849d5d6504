"""The same router by its two doors: what HTTP adds to the first token, and how many tokens it relays beside gRPC.

Both doors get the same text and the same workers; clients take turns.
"""

from __future__ import annotations

import contextlib
import statistics
import time

from benchmarks.report import Row, half_spread
from benchmarks.router.engine import Speed
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Answer, Ask
from benchmarks.router.rig import OTHER_CORE, Node, Rig, node, rig
from benchmarks.router.runs import WARM_UP_S, Run, at_most, plain
from splitfire.cli.supervisor import free_port

HTTP, GRPC = "http", "grpc"
STREAMS = 64
MODEL = "router-bench"


def http(turns: int, seconds: float) -> list[Row]:
    port = free_port()
    with rig(flags=("--max-requests=4096", "--ttft-target-s=3600", f"--http-port={port}")) as made, contextlib.ExitStack() as stack:
        clients = {GRPC: made.clients[0], HTTP: node(stack, "HttpClients", OTHER_CORE)}
        clients[HTTP].do("connect", port, MODEL)
        made.attach(FleetShape(2, 2, Speed()))
        first: dict[str, list[float]] = {GRPC: [], HTTP: []}
        for _ in range(turns):
            for name, client in clients.items():
                first[name].append(_median_ttft_ms(client, seconds))
        made.attach(FleetShape(1, 1, Speed()))
        runs: dict[str, list[Run]] = {GRPC: [], HTTP: []}
        for _ in range(turns):
            for name, client in clients.items():
                runs[name].append(_relayed(made, client, seconds))
    added = [a - b for a, b in zip(first[HTTP], first[GRPC], strict=True)]
    rows = [
        at_most("one stream", "added to gRPC's TTFT p50", "ms", added, 1.0),
        plain("one stream", "TTFT p50", "ms", first[HTTP]),
    ]
    for metric, rate in (("tokens a second, as seen", _seen), ("tokens a processor second", _by_cpu)):
        ours, theirs = ([rate(run) for run in runs[name]] for name in (HTTP, GRPC))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        value, other, spread = statistics.median(ours), statistics.median(theirs), half_spread(ours)
        rows.append(
            Row(f"{STREAMS} streams", metric, "1/s", value, other, "gRPC", ratio, "ratio at least 0.8", ratio >= 0.8, spread)
        )
    return rows


def _median_ttft_ms(client: Node, seconds: float) -> float:
    client.do("closed", Ask(300, 0, 2), 1, WARM_UP_S, 0)
    answers: list[Answer] = client.do("closed", Ask(300, 0, 2), 1, seconds, 1)
    return 1e3 * statistics.median(a.ttft_s for a in answers)


def _relayed(made: Rig, client: Node, seconds: float) -> Run:
    ask = Ask(300, 0, 500)
    client.do("closed", ask, STREAMS, WARM_UP_S, 0)
    cpu, began = made.cpu_s(), time.perf_counter()
    answers: list[Answer] = client.do("closed", ask, STREAMS, seconds, 1)
    for answer in answers:
        answer.num_tokens = ask.max_tokens
    return Run(answers, time.perf_counter() - began, made.cpu_s() - cpu).check()


def _seen(run: Run) -> float:
    return run.num_tokens / run.seconds


def _by_cpu(run: Run) -> float:
    return run.num_tokens / run.cpu_s
