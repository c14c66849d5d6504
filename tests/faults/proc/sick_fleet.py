"""A fleet whose router and workers can be taken ill, and what tests do to it and ask of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import grpc
import psutil
from grpc_health.v1 import health_pb2

from splitfire.cli.supervisor import Child, Fleet
from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import RunningFleet, cpu_s, generating, greedy, start_fleet, until
from tests.e2e.test_handoff import SLOW_RING, Asked, new_prompt

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
RESTART_S = 60.0
LONG_PROMPT = 1500  # tokens: two dozen chunks and payloads


@dataclass
class SickFleet(Fleet):
    """Every child is the real one, within reach of sick.py. Counts those that were started again after a SIGKILL."""

    num_killed: int = 0

    def _spawn(self, child: Child) -> None:
        self.num_killed += child.process is not None and child.process.poll() == -signal.SIGKILL
        super()._spawn(child)

    def _add(self, name: str, arguments: Sequence[str]) -> None:
        super()._add(name, ["-m", "tests.faults.proc.sick", *arguments[1:]])


class Watched:
    """Requests under way. Afterwards each must be what it is without a fault."""

    def __init__(self, fleet: RunningFleet, requests: Sequence[pb.GenerateRequest]) -> None:
        self._fleet = fleet
        self._requests = requests
        self.asked = [Asked(fleet, request) for request in requests]

    def until(self, num_tokens: int) -> None:
        """Every client has read as many."""
        for asked in self.asked:
            asked.until(num_tokens)

    def assert_right(self) -> None:
        for asked in self.asked:
            asked.join()
            assert asked.summary.request_id, "the stream ended with its summary"
        for asked, request in zip(self.asked, self._requests, strict=True):
            assert asked.ids == self._fleet.generate(request)[0].ids


class Ground:
    """The fleet, and what can be seen and done to its processes."""

    def __init__(self, fleet: RunningFleet) -> None:
        self.fleet = fleet

    def child(self, name: str) -> Child:
        [child] = [c for c in self.fleet.fleet.children if c.name == name]
        return child

    def names(self, role: str) -> list[str]:
        return [c.name for c in self.fleet.fleet.children if c.name.startswith(role)]

    def process(self, name: str) -> psutil.Process:
        return self.fleet.process(name)

    def exit_code(self, name: str, seconds: float) -> int:
        process = self.child(name).process
        assert process is not None
        return process.wait(seconds)

    def restart(self) -> None:
        """What a supervisor does, at once."""
        for child in self.fleet.fleet.children:
            child.delay_s = 0.0
        self.fleet.fleet.watch()  # finds who ended,
        self.fleet.fleet.watch()  # and starts it

    def heal(self) -> None:
        """Until everybody is there and every pair is known."""

        def is_whole() -> bool:
            self.restart()
            status = self.fleet.status()
            plan = self.fleet.fleet.plan
            num_pairs = plan.num_prefill * plan.num_decode
            return len(status.workers) == plan.num_prefill + plan.num_decode and len(status.pairs) == num_pairs

        until(is_whole, RESTART_S, lambda: str(self.fleet.status()))

    @property
    def num_killed(self) -> int:
        """Processes that died of SIGKILL and were started again."""
        assert isinstance(self.fleet.fleet, SickFleet)
        return self.fleet.fleet.num_killed

    @property
    def num_accepted(self) -> int:
        """Requests that wait or run."""
        status = self.fleet.status()
        return status.running_requests + status.queued_requests

    def generating(self) -> str:
        """A decode worker in the middle of an answer."""

        return generating(self.fleet)

    def said(self, name: str, event: str) -> list[dict[str, object]]:
        """What a child logged of `event`, all its incarnations together."""
        lines = self.child(name).log.read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == event]

    def health(self, name: str) -> int:
        """What a worker answers a probe; 0 when its port is closed."""
        return health_of(f"127.0.0.1:{self.said(name, 'ready')[-1]['status_port']}")

    def computes(self, names: Sequence[str], seconds: float = 0.05) -> None:
        """Until one of these workers has computed for so long."""
        processes = [self.process(name) for name in names]
        before = sum(map(cpu_s, processes))
        until(lambda: sum(map(cpu_s, processes)) > before + seconds, 30)


def health_of(address: str) -> int:
    """0 when nobody answers."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        try:
            return int(check(health_pb2.HealthCheckRequest(), timeout=5).status)
        except grpc.RpcError:
            return 0


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """They neither compute nor answer; who is killed meanwhile stays so."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@contextmanager
def sick_fleet(prefill: int, decode: int, router: Sequence[str] = ("--split=always",)) -> Iterator[Ground]:
    with start_fleet("pico", prefill, decode, router=router, worker=(*SLOW_RING, "--speculate=off"), kind=SickFleet) as fleet:
        yield Ground(fleet)


def seeded(count: int, prompt_tokens: int = 100) -> pb.GenerateRequest:
    """A prompt nobody has seen, and an answer that is drawn."""
    request = greedy(new_prompt(prompt_tokens), count)
    request.sampling.temperature, request.sampling.seed = 0.8, 5
    return request


def some_of_each(num: int, count: int, prompt_tokens: int = 100) -> list[pb.GenerateRequest]:
    """Greedy and seeded in turn."""
    return [seeded(count, prompt_tokens) if i % 2 else greedy(new_prompt(prompt_tokens), count) for i in range(num)]
