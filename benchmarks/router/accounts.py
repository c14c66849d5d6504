"""What accounting for time is worth and what it costs, on real fleets of `pico`.

accounts: requests under load; how far the phases are from the router's own time to the first token, and that from the client's.
telemetry: the same load on fleets that take turns: without telemetry, with metrics that are scraped, with traces and metrics to a
collector, with a collector that is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from benchmarks.report import Row, half_spread
from benchmarks.router.rig import cpu_s
from benchmarks.router.runs import at_most, plain
from splitfire.cli.supervisor import Fleet, FleetPlan, free_port
from splitfire.core.model_source import resolve_model
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

STREAMS, REQUESTS = 4, 1000
TOKENS = 16
LOAD_STREAMS, LOAD_TOKENS = 8, 96
SCRAPE_S = 1.0
NONE, SCRAPED = "no telemetry", "metrics, scraped every second"
COLLECTOR = """
import grpc, sys, time
from concurrent.futures import ThreadPoolExecutor
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as m, metrics_service_pb2_grpc as mg
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as t, trace_service_pb2_grpc as tg
class Traces(tg.TraceServiceServicer):
    def Export(self, request, context): return t.ExportTraceServiceResponse()
class Metrics(mg.MetricsServiceServicer):
    def Export(self, request, context): return m.ExportMetricsServiceResponse()
server = grpc.server(ThreadPoolExecutor(2))
tg.add_TraceServiceServicer_to_server(Traces(), server)
mg.add_MetricsServiceServicer_to_server(Metrics(), server)
server.add_insecure_port("127.0.0.1:" + sys.argv[1])
server.start()
time.sleep(36000)
"""  # takes everything and keeps nothing
ECHO = """
import os, socket, sys, threading, time
here, there = socket.socketpair()
if not os.fork():
    while there.recv(64): there.sendall(b"x")
    os._exit(0)
done, taken = [], []
threading.Thread(target=lambda: done.append(sys.stdin.read()), daemon=True).start()
while not done:
    began = time.perf_counter()
    here.sendall(b"x"); here.recv(64)
    taken.append(time.perf_counter() - began)
    time.sleep(0.005)
taken.sort()
here.shutdown(socket.SHUT_RDWR)
print(1e3 * taken[len(taken) // 2], 1e3 * taken[int(0.99 * (len(taken) - 1))])
"""  # two processes that do nothing but answer one another: what the kernel lets anybody wait beside this load


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer by the client's clock, and what the router said of it."""

    first_s: float
    summary: pb.Summary


def accounts(turns: int, seconds: float) -> list[Row]:
    """Under load."""
    count = REQUESTS if seconds >= 1 else 40
    with _fleet() as fleet:
        address = fleet.address
        asyncio.run(_ask_all(address, 40, STREAMS, TOKENS))
        with _echo() as echo:
            found = asyncio.run(_ask_all(address, count, STREAMS, TOKENS))
        alone = asyncio.run(_ask_all(address, count // 10, 1, TOKENS))
    off = max(abs(_leg(one.summary, pb.LEG_FIRST_TOKEN) - one.summary.first_token_s) for one in found)
    case = f"{len(found)} requests, {STREAMS} at a time"
    rows = [at_most(case, "phases off the router's own TTFT, at most", "ns", [1e9 * off], 1.0)]
    for answers, of in ((found, case), (alone, f"{len(alone)} requests, one at a time")):
        late = sorted(1e3 * (one.first_s - one.summary.first_token_s) for one in answers)
        rows += [
            at_most(of, "client's TTFT later than the router's, p50", "ms", [statistics.median(late)], 1.0),
            at_most(of, "client's TTFT later than the router's, p99", "ms", [late[int(0.99 * (len(late) - 1))]], 5.0),
            plain(of, "client's TTFT p50", "ms", [statistics.median(1e3 * one.first_s for one in answers)]),
        ]
    wait = "a byte there and back between two processes"
    rows += [plain(f"beside {case}", f"{wait}, {at}", "ms", [ms]) for at, ms in zip(("p50", "p99"), echo, strict=True)]
    return rows


def telemetry(turns: int, seconds: float) -> list[Row]:
    """In turn."""
    metrics_port, collector_port = free_port(), free_port()
    here, nowhere = (f"http://127.0.0.1:{port}" for port in (collector_port, free_port()))
    with contextlib.ExitStack() as stack:
        collector = subprocess.Popen([sys.executable, "-c", COLLECTOR, str(collector_port)])
        stack.callback(collector.kill)
        fleets = {
            NONE: stack.enter_context(_fleet()),
            SCRAPED: stack.enter_context(_fleet((f"--metrics-port={metrics_port}",))),
            "traces to a collector": stack.enter_context(_fleet(OTEL_EXPORTER_OTLP_ENDPOINT=here, OTEL_METRICS_EXPORTER="none")),
            "traces and metrics to a collector": stack.enter_context(_fleet(OTEL_EXPORTER_OTLP_ENDPOINT=here)),
            "both, to a collector that is down": stack.enter_context(_fleet(OTEL_EXPORTER_OTLP_ENDPOINT=nowhere)),
        }
        rates: dict[str, list[float]] = {name: [] for name in fleets}
        costs: dict[str, list[float]] = {name: [] for name in fleets}
        for turn in range(3 * turns + 1):
            names = [*fleets]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # who is first is another one each time
                fleet = fleets[name]
                pids = [child.process.pid for child in fleet.children if child.process is not None]
                with _scraping(metrics_port) if name == SCRAPED else contextlib.nullcontext():
                    began_s = sum(map(cpu_s, pids))
                    rate = asyncio.run(_tokens_per_s(fleet.address, seconds))
                    taken_s = sum(map(cpu_s, pids)) - began_s
                if turn:  # the first is for warming up
                    rates[name].append(rate)
                    costs[name].append(1e6 * taken_s / (rate * seconds))
    rows = [plain(NONE, "tokens a second", "1/s", rates[NONE]), plain(NONE, "processor time a token", "us", costs[NONE])]
    for name, target in zip([*fleets][1:], (0.99, 0.97, None, 0.99), strict=True):
        rows.append(_rate_row(name, rates[name], rates[NONE], target))
        rows.append(
            plain(
                name,
                "processor time a token, more",
                "%",
                [100 * (a / b - 1) for a, b in zip(costs[name], costs[NONE], strict=True)],
            )
        )
    return rows


def _rate_row(name: str, found: list[float], base: list[float], target: float | None) -> Row:
    """Turn by turn."""
    ratios = [a / b for a, b in zip(found, base, strict=True)]
    ratio, spread = statistics.median(ratios), half_spread(ratios)
    is_met = None if target is None else ratio >= target or ratio + spread >= 1.0
    at_least = "" if target is None else f"ratio at least {target}, or the spread"
    return Row(
        name, "tokens a second", "1/s", statistics.median(found), statistics.median(base), NONE, ratio, at_least, is_met, half_spread(found),
    )  # fmt: skip


@contextlib.contextmanager
def _fleet(router: tuple[str, ...] = (), **environment: str) -> Iterator[Fleet]:
    """One of its own."""
    path = resolve_model("pico")
    plan = FleetPlan(str(path), "pico", 1, 1, (), (), free_port(), ("--split=always", *router), ("--threads=1", "--speculate=off"))
    fleet = Fleet(plan, lambda _line: None)
    os.environ.update(environment)
    try:
        fleet.start()
        fleet.wait_ready()
    finally:
        for name in environment:
            del os.environ[name]
    try:
        yield fleet
    finally:
        fleet.stop()


@contextlib.contextmanager
def _echo() -> Iterator[list[float]]:
    """Median and 99th percentile in ms, once the context is left."""
    found: list[float] = []
    with subprocess.Popen([sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield found
        told, _ = process.communicate(timeout=10)
    found += map(float, told.split())


@contextlib.contextmanager
def _scraping(port: int) -> Iterator[None]:
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(SCRAPE_S):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _request(num_prompt: int, num_tokens: int, numbers: random.Random) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt_token_ids=[numbers.randrange(4000) for _ in range(num_prompt)],
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingParams(max_tokens=num_tokens, ignore_eos=True),
    )


async def _ask_all(address: str, count: int, streams: int, num_tokens: int) -> list[Timed]:
    numbers, found = random.Random(1), []
    left = iter([_request(numbers.randrange(32, 200), num_tokens, numbers) for _ in range(count)])
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def ask() -> None:
            for request in left:
                began, first_s = time.perf_counter(), 0.0
                async for response in stub.Generate(request, timeout=60):
                    if response.token_ids and not first_s:
                        first_s = time.perf_counter() - began
                    if response.HasField("summary"):
                        found.append(Timed(first_s, response.summary))

        await asyncio.gather(*(ask() for _ in range(streams)))
    return found


async def _tokens_per_s(address: str, seconds: float) -> float:
    numbers, num_tokens = random.Random(2), 0
    ends = time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def ask() -> None:
            nonlocal num_tokens
            while time.perf_counter() < ends:
                async for response in stub.Generate(_request(64, LOAD_TOKENS, numbers), timeout=60):
                    num_tokens += len(response.token_ids) if time.perf_counter() < ends else 0

        await asyncio.gather(*(ask() for _ in range(LOAD_STREAMS)))
    return num_tokens / seconds


def _leg(summary: pb.Summary, leg: pb.Leg.ValueType) -> float:
    return sum(phase.duration_s for phase in summary.phases if phase.leg == leg)
