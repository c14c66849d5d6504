"""A load against a server that answers late, in lumps, with errors, or not at all: what is counted, and when it is said to have come."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from splitfire.cli.bench import run
from splitfire.cli.bench.arrivals import Planned, Window
from splitfire.cli.bench.run import Result, Run, Target, phases_to_first_token
from splitfire.cli.bench.statistics import PhaseTime
from splitfire.cli.bench.sweep import message
from splitfire.cli.credentials import write_certificates
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

# What the server does is told by the number of tokens of the prompt.
ANSWERS, REFUSES, CUTS_SHORT, HANGS, BREAKS = 1, 2, 3, 4, 5
FIRST_S, NEXT_S = 0.06, 0.02
LUMPS = (1, 1, 2, 1)  # tokens of each message
SLACK_S = 0.3  # that a loaded machine adds to what is expected


class Server(inference_pb2_grpc.InferenceServicer):
    """`first_s` of each answer: how long after its arrival it sent the first token, by the clock of this process."""

    def __init__(self) -> None:
        self.first_s: list[float] = []
        self.most_at_once = 0
        self.ended = threading.Event()
        self.hangs: Callable[[], None] = lambda: None  # called when it begins to
        self.keys: set[str] = set()
        self._at_once = 0

    def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:  # noqa: N802
        raise NotImplementedError

    def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[pb.Model(id="fake", context_length=64, vocab_size=100)])

    def GetFleet(self, request: pb.GetFleetRequest, context: object) -> pb.GetFleetResponse:  # noqa: N802
        return pb.GetFleetResponse(running_requests=self._at_once)

    def GetTraces(self, request: pb.GetTracesRequest, context: object) -> pb.GetTracesResponse:  # noqa: N802
        raise NotImplementedError

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        arrived = time.perf_counter()
        self.keys |= {str(value) for name, value in context.invocation_metadata() if name == "authorization"}
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield from self._answer(len(request.prompt_token_ids), arrived, context)
        finally:
            self._at_once -= 1

    def _answer(self, kind: int, arrived: float, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        if kind == REFUSES:
            detail = any_pb2.Any()
            detail.Pack(ErrorInfo(reason="queue_full", domain="splitfire"))
            context.abort_with_status(
                rpc_status.to_status(status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="full", details=[detail]))
            )
        if kind == HANGS:
            self.hangs()
            self.ended.wait(30)
            return
        for number, count in enumerate(LUMPS):
            self.ended.wait(NEXT_S if number else FIRST_S)
            if not number:
                self.first_s.append(time.perf_counter() - arrived)
            yield pb.GenerateResponse(token_ids=range(count))
            if kind == BREAKS:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        if kind != CUTS_SHORT:
            yield pb.GenerateResponse(summary=pb.Summary(usage=pb.Usage(cached_prompt_tokens=1)))


@pytest.fixture
def server() -> Iterator[tuple[Server, Target]]:
    servicer = Server()
    listener = grpc.server(ThreadPoolExecutor(200))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    yield servicer, Target(f"127.0.0.1:{port}")
    servicer.ended.set()
    listener.stop(None).wait()


def load(target: Target, plan: list[tuple[float, int]], window: Window, timeout_s: float = 5.0, **options: object) -> Result:
    """`plan`: when, and what the server is to do."""
    requests = [
        (planned := Planned(at, kind, 5, at >= window.warmup_s), message([1] * kind, planned.num_output, 0).SerializeToString())
        for at, kind in plan
    ]
    return asyncio.run(Run(target, requests, window, timeout_s, **options)())  # type: ignore[arg-type]


def test_answers_are_timed_as_they_come(server: tuple[Server, Target]) -> None:
    """Medians: single answers may be late on a machine that others use too."""
    result = load(server[1], [(0.04 * i, ANSWERS) for i in range(25)], Window(0.0, 1.0))
    assert [outcome.error for outcome in result.outcomes] == [""] * 25
    assert all(outcome.num_tokens == sum(LUMPS) and len(outcome.gaps_s) == sum(LUMPS) - 1 for outcome in result.outcomes)
    assert all(outcome.num_cached == 1 for outcome in result.outcomes)
    assert result.duration_s == pytest.approx(1.0)
    assert all(outcome.ttft_s >= FIRST_S for outcome in result.outcomes)
    sent, seen = statistics.median(server[0].first_s), statistics.median(outcome.ttft_s for outcome in result.outcomes)
    assert sent <= seen <= sent + SLACK_S
    assert 0.7 * 3 * NEXT_S <= statistics.median(sum(outcome.gaps_s) for outcome in result.outcomes) <= 3 * NEXT_S + SLACK_S
    assert all(outcome.gaps_s[1] == outcome.gaps_s[2] for outcome in result.outcomes), (
        "two tokens in one message: half of the gap each"
    )


def test_requests_do_not_wait_for_answers(server: tuple[Server, Target]) -> None:
    """Open loop: each answer takes 120 ms, and eighty are asked for within 80; one after the other would be ten seconds."""
    began = time.perf_counter()
    result = load(server[1], [(0.001 * i, ANSWERS) for i in range(80)], Window(0.0, 0.1))
    assert time.perf_counter() - began < 5
    assert server[0].most_at_once > 20
    assert len(result.outcomes) == 80


def test_errors_are_counted_by_their_reason(server: tuple[Server, Target]) -> None:
    kinds = [ANSWERS, REFUSES, CUTS_SHORT, HANGS, BREAKS]
    result = load(server[1], [(0.01 * i, kind) for i, kind in enumerate(kinds * 3)], Window(0.0, 0.2), timeout_s=2.0)
    by_kind = {kind: {o.error for o in result.outcomes if o.num_prompt == kind} for kind in kinds}
    assert by_kind == {
        ANSWERS: {""}, REFUSES: {"queue_full"}, CUTS_SHORT: {"incomplete_stream"}, HANGS: {"deadline_exceeded"}, BREAKS: {"unavailable"}
    }  # fmt: skip
    assert len(result.outcomes) == 15


def test_the_warm_up_does_not_count(server: tuple[Server, Target]) -> None:
    result = load(server[1], [(0.0, REFUSES), (0.05, ANSWERS), (0.2, ANSWERS)], Window(0.1, 0.2))
    assert [(outcome.due_s, outcome.error) for outcome in result.outcomes] == [(0.2, "")]
    assert result.begin_s == 0.1


def test_a_load_goes_through_tls_and_shows_its_key(tmp_path: Path) -> None:
    write_certificates(tmp_path, [], timedelta(days=1), datetime.now(UTC))
    read = {name: (tmp_path / name).read_bytes() for name in ("router.key", "router.pem", "ca.pem")}
    servicer, listener = Server(), grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, listener)
    credentials = grpc.ssl_server_credentials([(read["router.key"], read["router.pem"])])
    port = listener.add_secure_port("127.0.0.1:0", credentials)
    listener.start()
    try:
        target = Target(f"127.0.0.1:{port}", b"a-key-of-somebody", read["ca.pem"])
        result = load(target, [(0.0, ANSWERS), (0.01, ANSWERS)], Window(0.0, 0.1))
    finally:
        listener.stop(None).wait()
    assert [outcome.error for outcome in result.outcomes] == ["", ""]
    assert servicer.keys == {"Bearer a-key-of-somebody"}


def test_nobody_there_is_an_error_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CONNECT_S", 0.2)
    result = load(Target("127.0.0.1:9"), [(0.0, ANSWERS), (0.01, ANSWERS)], Window(0.0, 0.1))
    assert [outcome.error for outcome in result.outcomes] == ["unavailable"] * 2


def test_a_connection_that_is_full_gets_a_second_one(server: tuple[Server, Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """And when there may be no more of them, that is an error of the client's own, not a request left out."""
    monkeypatch.setattr(run, "STREAMS", 10)
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 3)
    result = load(server[1], [(0.001 * i, ANSWERS) for i in range(50)], Window(0.0, 0.1))
    errors = [outcome.error for outcome in result.outcomes]
    assert errors.count("") == 30
    assert errors.count("client_too_many_streams") == 20


def test_a_late_client_knows_it(server: tuple[Server, Target]) -> None:
    """Something holds the loop for 150 ms: it is in the lag, in the lateness, and in the time to first token."""
    result = load(server[1], [(0.05 * i, ANSWERS) for i in range(16)], Window(0.0, 0.8), watch=lambda: time.sleep(0.15))
    assert max(result.client.lags_s) > 0.1
    late = [outcome for outcome in result.outcomes if outcome.late_s > 0.05]
    assert late
    assert all(outcome.ttft_s >= FIRST_S + outcome.late_s for outcome in late)


def test_ctrl_c_leaves_what_there_is(server: tuple[Server, Target]) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server[0].hangs = lambda: os.kill(os.getpid(), signal.SIGINT)
        began = time.perf_counter()
        plan = [(0.0, ANSWERS), (0.3, ANSWERS), (2.0, HANGS), (9.0, ANSWERS)]
        result = load(server[1], plan, Window(0.2, 10.0), timeout_s=30)
        assert time.perf_counter() - began < 6
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [outcome.due_s for outcome in result.outcomes] == [0.3]
    assert (result.num_unfinished, result.is_cut) == (1, True)
    assert 1.8 < result.duration_s < 5.0


def test_what_the_watcher_gives_up_on_ends_the_run(server: tuple[Server, Target]) -> None:
    def watch() -> None:
        raise RuntimeError("the fleet is gone")

    with pytest.raises(RuntimeError, match="the fleet is gone"):
        load(server[1], [(0.0, ANSWERS)], Window(0.0, 0.7), watch=watch)


def test_phases_that_overlap_are_left_out() -> None:
    """Of routers that say to which leg of an answer a phase belongs, those to the first token; of others none."""
    untold = pb.Summary(phases=[pb.Phase(name="prefill", duration_s=0.1)])
    assert phases_to_first_token(untold) == ()
    told = SimpleNamespace(
        phases=[
            SimpleNamespace(name="prefill", duration_s=0.1, leg=run.LEG_FIRST_TOKEN),
            SimpleNamespace(name="ship", duration_s=0.2, leg=run.LEG_FIRST_TOKEN + 1),
        ]
    )
    assert phases_to_first_token(cast(pb.Summary, told)) == (PhaseTime("prefill", 0.1),)
