"""Clients that ask one request after another, and note what came when. One thread each."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.e2e.fleets import Refusal, refusal_of

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message with tokens."""

    at: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request, and when."""

    number: int
    asked_at: float
    arrivals: tuple[Arrival, ...]
    ids: tuple[int, ...]
    refusal: Refusal | None  # None: it ended as it should
    retry_after_s: float  # as the refusal says; 0 where it says nothing
    is_contiguous: bool  # offsets without a gap or a repeat, one end, nothing after the summary (P2)

    @property
    def longest_gap_s(self) -> float:
        """Between two messages, or before the first."""
        instants = [self.asked_at, *(a.at for a in self.arrivals)]
        return max((b - a for a, b in itertools.pairwise(instants)), default=0.0)


def requests_of(count: int, prompt_tokens: int, output_tokens: int) -> list[pb.GenerateRequest]:
    """Prompts that begin differently; every second one is sampled, with a seed."""
    random = Random(6)
    made = []
    for number in range(count):
        sampling = pb.SamplingParams(temperature=0.8, seed=number) if number % 2 else pb.SamplingParams(temperature=0.0)
        prompt = [random.randrange(1, 4000) for _ in range(prompt_tokens)]
        stopping = pb.StoppingParams(max_tokens=output_tokens, ignore_eos=True)
        made.append(pb.GenerateRequest(prompt_token_ids=prompt, sampling=sampling, stopping=stopping))
    return made


def ask(stub: inference_pb2_grpc.InferenceStub, number: int, request: pb.GenerateRequest) -> Outcome:
    """One request to its end, whatever that is. It waits for a connection: while gRPC makes a new one, other calls fail at once."""
    asked_at = time.monotonic()
    arrivals: list[Arrival] = []
    ids: list[int] = []
    refusal, retry_after_s, is_contiguous, num_ends = None, 0.0, True, 0
    try:
        for response in stub.Generate(request, timeout=TIMEOUT_S, wait_for_ready=True):
            is_contiguous &= not num_ends
            num_ends += response.HasField("summary")
            if response.token_ids:
                is_contiguous &= response.offset == len(ids)
                ids += response.token_ids
                arrivals.append(Arrival(time.monotonic(), len(response.token_ids)))
    except grpc.RpcError as exc:
        refusal, retry_after_s = refusal_of(exc), _retry_after_s(exc)
    is_contiguous &= refusal is not None or num_ends == 1
    return Outcome(number, asked_at, tuple(arrivals), tuple(ids), refusal, retry_after_s, is_contiguous)


def _retry_after_s(error: grpc.RpcError) -> float:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = RetryInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return 0.0


class Clients:
    """So many clients that share the requests out among themselves; each asks its next when the one before is over. Who is
    told to come again later does so: its request is lost all the same."""

    def __init__(self, stubs: Sequence[inference_pb2_grpc.InferenceStub], requests: Sequence[pb.GenerateRequest]) -> None:
        self.outcomes: list[Outcome] = []
        self._requests = requests
        self._threads = [
            threading.Thread(target=self._run, args=(stub, range(i, len(requests), len(stubs))), daemon=True)
            for i, stub in enumerate(stubs)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def are_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self) -> list[Outcome]:
        for thread in self._threads:
            thread.join()
        return sorted(self.outcomes, key=lambda o: o.number)

    def _run(self, stub: inference_pb2_grpc.InferenceStub, numbers: range) -> None:
        for number in numbers:
            outcome = ask(stub, number, self._requests[number])
            self.outcomes.append(outcome)
            if outcome.refusal is not None:
                time.sleep(outcome.retry_after_s)
