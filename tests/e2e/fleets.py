"""Starting fleets, asking them, and looking inside, for the end-to-end tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from splitfire.cli.supervisor import Fleet, FleetPlan, free_port
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

PROMPT = list(range(200, 300))


@dataclass
class Answer:
    """One choice of a finished stream."""

    ids: list[int]
    text: str
    finish_reason: int
    summary: pb.Summary
    logprobs: list[pb.TokenLogprobs]


class RunningFleet:
    """A fleet that is ready, and a channel to it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.channel = grpc.insecure_channel(fleet.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def address(self) -> str:
        return self.fleet.address

    def generate(self, request: pb.GenerateRequest, timeout: float = 60.0, **call: Any) -> dict[int, Answer]:
        """Every choice by number, the stream contract checked (P2): offsets contiguous, one end each, the summary last."""
        answers: dict[int, Answer] = {}
        summary = None
        for response in self.stub.Generate(request, timeout=timeout, **call):
            assert summary is None, "something came after the summary"
            if response.HasField("summary"):
                summary = response.summary
                continue
            answer = answers.setdefault(response.choice, Answer([], "", 0, pb.Summary(), []))
            assert not answer.finish_reason, "something came after the end of a choice"
            assert response.offset == len(answer.ids)
            answer.ids += response.token_ids
            answer.text += response.text
            answer.logprobs += response.logprobs
            answer.finish_reason = response.finish_reason
        assert summary is not None, "the stream ended without a summary"
        for answer in answers.values():
            assert answer.finish_reason
            answer.summary = summary
        return answers

    def ids(self, prompt: Sequence[int] = PROMPT, count: int = 16, **fields: Any) -> list[int]:
        """Greedy tokens of one choice."""
        return self.generate(greedy(prompt, count, **fields))[0].ids

    def status(self) -> pb.GetFleetResponse:
        return self.stub.GetFleet(pb.GetFleetRequest(), timeout=10)

    def worker(self, name: str) -> pb.WorkerStatus:
        return next(w for w in self.status().workers if w.worker_id == name)

    def process(self, name: str) -> psutil.Process:
        [child] = [c for c in self.fleet.children if c.name == name]
        assert child.process is not None
        return psutil.Process(child.process.pid)

    @property
    def is_quiet(self) -> bool:
        """Nothing runs, waits, or holds a block or a slot, as the workers report it."""
        status = self.status()
        held = [
            w for w in status.workers if w.free_blocks != w.total_blocks or w.held_slots or w.running_sequences or w.queued_tokens
        ]
        return not held and not status.running_requests and not status.queued_requests

    def assert_no_leaks(self, seconds: float = 5.0) -> None:
        until(lambda: self.is_quiet, seconds, lambda: str(self.status()))


@contextmanager
def start_fleet(
    model: str,
    prefill: int = 1,
    decode: int = 1,
    *,
    router: Sequence[str] = ("--split=always",),
    worker: Sequence[str] = (),
    shared: Sequence[str] = (),
    kind: type[Fleet] = Fleet,
) -> Iterator[RunningFleet]:
    """Deterministic: in fp32, so that tokens are those of transformers."""
    flags = tuple(dict.fromkeys(("--threads=1", "--dtype=fp32", *worker)))
    plan = FleetPlan(model, Path(model).name, prefill, decode, (), (), free_port(), tuple(router), flags, tuple(shared))
    fleet = kind(plan, print)
    try:
        fleet.start()
        fleet.wait_ready()
        running = RunningFleet(fleet)
        yield running
        running.channel.close()
    finally:
        fleet.stop()


def greedy(prompt: Sequence[int] = PROMPT, count: int = 16, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingParams(max_tokens=count, ignore_eos=True),
        **fields,
    )


def generated_at(summary: pb.Summary) -> set[str]:
    """The decode workers that had a part in it and told of it."""
    return {phase.worker for phase in summary.phases if phase.name in ("step", "forward")}


def generating(fleet: RunningFleet) -> str:
    """A decode worker in the middle of an answer, as it reported."""
    busy: list[str] = []

    def look() -> bool:
        busy[:] = [w.worker_id for w in fleet.status().workers if w.role == pb.ROLE_DECODE and w.running_sequences]
        return bool(busy)

    until(look)
    return busy[0]


LONG = greedy(count=1900)
LONG.sampling.temperature = 1.5  # nothing that could be guessed, so it takes its time
SLOW = ("--kernels=torch", "--speculate=off")  # a worker whose answers are not over before it reports them


def lasting(request_id: str) -> pb.GenerateRequest:
    """LONG, by this name."""
    request = pb.GenerateRequest(request_id=request_id)
    request.MergeFrom(LONG)
    return request


@dataclass(frozen=True)
class Refusal:
    """What a client can see of an error."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str
    is_retryable: bool
    metadata: dict[str, str]


def refusal_of(error: grpc.RpcError) -> Refusal:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    has_retry = False
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad)
        has_retry |= detail.Unpack(retry)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return Refusal(error.code(), info.reason, error.details() or "", field, has_retry, dict(info.metadata))


def until(condition: Callable[[], object], seconds: float = 10.0, what: Callable[[], str] = lambda: "") -> None:
    """Polls; the tests' only way to wait."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition never came true; {what()}"
        time.sleep(0.02)


def cpu_s(process: psutil.Process) -> float:
    """Processor time so far: how much work a process did, whatever the machine does beside it."""
    times = process.cpu_times()
    return float(times.user + times.system)
