"""Group B of bad inputs: who may join the fleet, what a worker may say, and who is told when one goes. Real gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from router.fleet import Fleet
from router.fleet_api import FleetService
from router.hello import check_hello, clamp
from router.placement import Rules, place
from router.views import AGEING, Demand, Placement
from router.worker_handle import PromptWork, WorkerHandle
from splitfire.core.errors import InvalidInput
from splitfire.core.fingerprint import PROTOCOL_MAJOR
from splitfire.core.model_dir import ModelDir
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2
from tests.checkpoints import PICO
from tests.router.fakes import FakeWorker, describe, make_hello

TOKEN = b"t" * 32
BEARER = (("authorization", "Bearer " + TOKEN.decode()),)


@dataclass
class Door:
    fleet: Fleet
    stub: fleet_pb2_grpc.FleetAsyncStub


@asynccontextmanager
async def door() -> AsyncIterator[Door]:
    """A router's worker port, with a token."""
    fleet = Fleet(ModelDir(PICO), lambda: None)
    server = grpc.aio.server()
    fleet_pb2_grpc.add_FleetServicer_to_server(FleetService(fleet, "r1", TOKEN), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Door(fleet, fleet_pb2_grpc.FleetStub(channel))
    await server.stop(0)


async def attach(at: Door, hello: fleet_pb2.Hello, metadata: tuple[tuple[str, str], ...] = BEARER) -> grpc.aio.StreamStreamCall:  # type: ignore[type-arg]
    call = at.stub.Attach(metadata=metadata)
    await call.write(fleet_pb2.AttachRequest(hello=hello))
    frame = await call.read()
    if isinstance(frame, fleet_pb2.AttachResponse):
        assert frame.welcome.router_id == "r1"
    return call


async def refusal(
    at: Door, hello: fleet_pb2.Hello, metadata: tuple[tuple[str, str], ...] = BEARER
) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        call = await attach(at, hello, metadata)
        await call.read()
        await call.wait_for_connection()
        raise AssertionError(await call.code())
    info = ErrorInfo()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    status.details[0].Unpack(info)
    assert at.fleet.workers == []
    return caught.value.code(), info.reason, caught.value.details() or ""


def changed(field: str, value: Any) -> dict[str, Any]:
    return {field: value}


async def next_frame(call: Any) -> fleet_pb2.AttachResponse:
    frame = await asyncio.wait_for(call.read(), 5)
    assert isinstance(frame, fleet_pb2.AttachResponse)
    return frame


class Lost:
    """An attempt that only notes who was lost."""

    def __init__(self, lost: list[bytes]) -> None:
        self._lost = lost

    num_choices = 1

    def on_output(self, incarnation: bytes, output: fleet_pb2.SequenceOutput) -> None: ...

    def on_finished(self, incarnation: bytes, finished: fleet_pb2.Finished) -> None: ...

    def on_refused(self, incarnation: bytes, refused: fleet_pb2.Refused) -> None: ...

    def on_lost(self, incarnation: bytes, *, is_death: bool) -> None:
        self._lost.append(incarnation)


def play(scene: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 30))


WRONG = (("authorization", "Bearer wrong"),)
NEARLY = (("authorization", "Bearer " + "t" * 31 + "u"),)


@pytest.mark.parametrize("metadata", [(), WRONG, NEARLY, (*BEARER, *BEARER)])
def test_only_who_has_the_token_may_join(metadata: tuple[tuple[str, str], ...]) -> None:
    """B53, B40: missing, wrong, one character off, twice."""

    async def scene() -> None:
        async with door() as at:
            code, reason, _ = await refusal(at, make_hello(), metadata)
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "fleet_token")
            report = at.stub.Report(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError):
                await report.read()
                await report.write(fleet_pb2.ReportRequest())
                await report.read()
                raise AssertionError("accepted")

    play(scene())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", 0), ("role", 9), ("worker_id", ""), ("worker_id", "x" * 129), ("worker_id", "a\nb"), ("incarnation", b"short"),
        ("capacity__total_blocks", 0), ("capacity__max_running", 0), ("capacity__max_context", 0), ("capacity__chunk_tokens", 2**31),
        ("capacity__total_blocks", 2**32 - 1), ("host", "h" * 10_000), ("host", "a\nb"), ("fingerprint__weights", b"z"),
        ("fingerprint__block_size", 0), ("fingerprint__block_size", 33), ("kv_format__block_size", 0), ("kv_format__block_size", 64),
        ("kv_format__dtype", "fp4"), ("kv_format__dtype", "x" * 1000),
        ("fingerprint__weight_format", "x" * 10**6), ("machine__machine_id", "x" * 65), ("machine__transport", "a\nb"),
        ("machine__transport_version", "1" * 33),
    ],
)  # fmt: skip
def test_a_hello_out_of_range_is_named(field: str, value: Any) -> None:
    """B54, B55."""
    with pytest.raises(InvalidInput) as caught:
        check_hello(make_hello(**changed(field, value)))
    assert caught.value.field.split(".")[-1] == field.split("__")[-1] or field == "kv_format__block_size"


@pytest.mark.parametrize("settings", [["UCX_TLS=a"] * 3, ["UCX_TLS=" + "x" * 300], ["UCX_TLS=a\x1b[2J"]])
def test_settings_of_a_machine_are_few_short_and_printable(settings: list[str]) -> None:
    hello = make_hello()
    hello.machine.ucx_settings.append("UCX_TLS=^tcp")
    check_hello(hello)
    hello.machine.ucx_settings[:] = settings
    with pytest.raises(InvalidInput, match="ucx_settings"):
        check_hello(hello)


def test_transports_are_bounded() -> None:
    hello = make_hello()
    hello.transports[0].address = b"x" * 5000
    with pytest.raises(InvalidInput, match="transports"):
        check_hello(hello)
    del hello.transports[:]
    with pytest.raises(InvalidInput, match="transports"):
        check_hello(hello)


def test_a_worker_of_another_version_is_told_both() -> None:
    """F65."""

    async def scene() -> None:
        async with door() as at:
            code, reason, details = await refusal(at, make_hello(version__major=PROTOCOL_MAJOR + 1))
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "version")
            assert f"{PROTOCOL_MAJOR + 1}.0" in details
            assert f"{PROTOCOL_MAJOR}.0" in details

    play(scene())


@pytest.mark.parametrize("field", ["config", "tokenizer"])
def test_a_worker_of_another_model_than_the_routers_is_refused(field: str) -> None:
    async def scene() -> None:
        async with door() as at:
            code, reason, _ = await refusal(at, make_hello(**changed(f"fingerprint__{field}", b"z" * 32)))
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, f"fingerprint_{field}")

    play(scene())


@pytest.mark.parametrize(
    ("field", "value"), [("weights", b"z" * 32), ("block_size", 16), ("rope", b"z" * 32), ("weight_format", "int8")]
)
def test_workers_that_do_not_match_one_another_are_not_mixed(field: str, value: Any) -> None:
    """F66, F67, P24."""

    async def scene() -> None:
        async with door() as at:
            FakeWorker(at.fleet, "prefill")
            call = at.stub.Attach(metadata=BEARER)
            hello = make_hello(**changed(f"fingerprint__{field}", value))
            hello.kv_format.block_size = hello.fingerprint.block_size
            await call.write(fleet_pb2.AttachRequest(hello=hello))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
                await call.read()
                raise AssertionError("accepted")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert f"{field} differs" in (caught.value.details() or "")
            assert len(at.fleet.workers) == 1

    play(scene())


def test_a_stream_that_says_nothing_or_nonsense_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """B77."""
    from splitfire.core import limits

    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.2)

    async def scene() -> None:
        async with door() as at:
            silent = at.stub.Attach(metadata=BEARER)
            assert await asyncio.wait_for(silent.read(), 5) is grpc.aio.EOF
            monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 5.0)
            wrong = at.stub.Attach(metadata=BEARER)
            await wrong.write(fleet_pb2.AttachRequest(refused=fleet_pb2.Refused(attempt=1)))
            with pytest.raises(grpc.aio.AioRpcError, match="the first one must be hello"):
                await wrong.read()
                raise AssertionError
            assert at.fleet.workers == []

    play(scene())


@pytest.mark.parametrize("is_restart", [False, True])
def test_who_attaches_again_takes_its_own_place(is_restart: bool) -> None:
    """B56: a worker that dials again before the broken stream was noticed, or was restarted under its name."""

    async def scene() -> None:
        async with door() as at:
            lost: list[bytes] = []
            hello = make_hello("decode", "d0")
            old_call = await attach(at, hello)
            peer = await attach(at, make_hello("prefill", "p0"))
            assert (await next_frame(peer)).HasField("peer_up")
            [old] = [w for w in at.fleet.workers if not w.is_prefill]
            at.fleet.begin(Placement(None, old.incarnation), PromptWork(10, 0, 0.1), Lost(lost))
            again = make_hello("decode", "d0") if is_restart else hello
            call = await attach(at, again)
            assert lost == [old.incarnation]
            assert (await next_frame(peer)).peer_gone.incarnation == hello.incarnation
            assert (await next_frame(peer)).peer_up.peer.incarnation == again.incarnation
            if is_restart:  # another process has its name: if it lives, it must not come back
                with pytest.raises(grpc.aio.AioRpcError, match="another worker attached as d0") as caught:
                    while await old_call.read() is not grpc.aio.EOF:
                        pass
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            else:
                while await old_call.read() is not grpc.aio.EOF:
                    pass  # its stream is ended
            assert [w.incarnation for w in at.fleet.workers if not w.is_prefill] == [again.incarnation]
            assert [w for w in at.fleet.workers if not w.is_prefill] != [old]
            call.cancel()
            peer.cancel()

    play(scene())


def test_a_report_of_an_incarnation_that_is_not_attached_is_told_to_attach_anew() -> None:
    """B57."""

    async def scene() -> None:
        async with door() as at:
            report = at.stub.Report(metadata=BEARER)
            await report.write(fleet_pb2.ReportRequest(incarnation=b"nobody", load=fleet_pb2.Load(free_blocks=5)))
            with pytest.raises(grpc.aio.AioRpcError, match="stale incarnation") as caught:
                await report.read()
                await report.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    play(scene())


def test_a_report_that_falls_silent_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """B43: the worker notices, and attaches anew."""
    from splitfire.core import limits

    monkeypatch.setattr(limits, "DEAD_AFTER_S", 0.2)

    async def scene() -> None:
        async with door() as at:
            report = at.stub.Report(metadata=BEARER)
            with pytest.raises(grpc.aio.AioRpcError, match="nothing was reported"):
                await report.read()

    play(scene())

    play(scene())


def test_peers_are_introduced_and_told_when_one_goes() -> None:
    async def scene() -> None:
        async with door() as at:
            prefill = await attach(at, make_hello("prefill", "p0"))
            decode = await attach(at, make_hello("decode", "d0"))
            seen = await next_frame(prefill)
            assert seen.peer_up.peer.worker_id == "d0"
            assert (await next_frame(decode)).peer_up.peer.worker_id == "p0"
            assert {w.worker_id for w in describe(at.fleet).workers} == {"p0", "d0"}
            decode.cancel()
            gone = await next_frame(prefill)
            assert gone.peer_gone.incarnation == seen.peer_up.peer.incarnation
            assert [w.hello.worker_id for w in at.fleet.workers] == ["p0"]
            prefill.cancel()

    play(scene())


def test_frames_of_attempts_that_are_not_here_are_dropped() -> None:
    """B60: unknown, finished, or another router's."""

    async def scene() -> None:
        async with door() as at:
            call = await attach(at, make_hello())
            for frame in (
                fleet_pb2.AttachRequest(
                    step_output=fleet_pb2.StepOutput(sequences=[fleet_pb2.SequenceOutput(attempt=99, token_ids=[1])])
                ),
                fleet_pb2.AttachRequest(finished=fleet_pb2.Finished(attempt=2**63)),
                fleet_pb2.AttachRequest(refused=fleet_pb2.Refused(attempt=0)),
                fleet_pb2.AttachRequest(),
            ):
                await call.write(frame)
            [worker] = at.fleet.workers
            for _ in range(1000):
                if worker.num_dropped == 3:
                    break
                await asyncio.sleep(0.005)
            assert worker.num_dropped == 3
            assert at.fleet.workers == [worker]
            call.cancel()

    play(scene())


def test_a_load_report_cannot_say_more_than_is_possible() -> None:
    """B58, F62."""
    lie = fleet_pb2.Load(total_blocks=10**6, free_blocks=10**6, prefill_tokens_per_s=math.nan, decode_tokens_per_s=math.inf)
    assert clamp(lie, 100)
    assert (lie.total_blocks, lie.free_blocks) == (100, 100)
    assert (lie.prefill_tokens_per_s, lie.decode_tokens_per_s) == (0.0, 0.0)
    assert not clamp(lie, 100)


def _placed(fleet: Fleet, demand: Demand, seed: int) -> Placement | None:
    decision = place(fleet.scan(), demand, Rules("never"), Random(seed))
    return decision.placement if decision is not None else None


def test_a_worker_that_lies_gets_work_only_when_there_is_nobody_else() -> None:
    """B58, B61: three reports that cannot be true, or one breach of the protocol."""

    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        liar, honest = FakeWorker(fleet, "decode", "d0"), FakeWorker(fleet, "decode", "d1")
        demand = Demand(10)
        for _ in range(3):
            assert not any(view.is_suspect for view in fleet.scan().workers)
            load = fleet_pb2.Load(free_blocks=10**6, total_blocks=100)
            fleet.on_report(fleet_pb2.ReportRequest(incarnation=liar.handle.incarnation, load=load))
        placed = {_placed(fleet, demand, seed) for seed in range(20)}
        assert placed == {Placement(None, honest.handle.incarnation)}
        fleet.strike(honest.handle.incarnation, "worker_protocol_error")
        placed = {_placed(fleet, demand, seed) for seed in range(40)}
        assert len(placed) == 2, "never the last of a role"

    play(scene())


def test_a_worker_that_does_not_read_its_stream_is_dropped() -> None:
    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        worker = FakeWorker(fleet, "decode")
        for _ in range(2000):
            worker.handle.send(cancel=fleet_pb2.Cancel(attempt=1))
        assert worker.handle.is_gone.is_set()
        assert not fleet.scan().workers[0].can_take

    play(scene())


def test_draining_workers_get_no_new_work() -> None:
    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        worker = FakeWorker(fleet, "decode")
        report = fleet_pb2.ReportRequest(incarnation=worker.handle.incarnation, load=fleet_pb2.Load(is_draining=True))
        fleet.on_report(report)
        assert not fleet.scan().workers[0].can_take
        assert describe(fleet).workers[0].is_draining
        assert describe(fleet).workers[0].role == inference_pb2.ROLE_DECODE

    play(scene())


def test_what_prompts_cost_anywhere_is_seen_of_every_worker_that_is_not_known() -> None:
    """By a report and by a prompt of another one: no view is older than what it shows."""

    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        first, second = FakeWorker(fleet, "prefill", "p0"), FakeWorker(fleet, "prefill", "p1")
        seen = {view.cost for view in fleet.scan().workers}
        load = fleet_pb2.Load(prefill_tokens_per_s=500.0)
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=first.handle.incarnation, load=load))
        by_report = {view.cost for view in fleet.scan().workers}
        timing = fleet_pb2.WorkerTiming(phases=[inference_pb2.Phase(name="prefill", duration_s=0.7)])
        fleet.computed(1, second.handle.incarnation, PromptWork(100, 0, 0.2), timing)
        by_prompt = {view.cost for view in fleet.scan().workers}
        assert len(seen) == len(by_report) == len(by_prompt) == 1
        assert len(seen | by_report | by_prompt) == 3

    play(scene())


@pytest.mark.parametrize(("is_first_come", "wait_s"), [(True, 7.0), (False, 0.0256)])
def test_what_is_waited_for_depends_on_the_order_in_which_a_worker_computes(is_first_come: bool, wait_s: float) -> None:
    """A short prompt behind two long ones: all of them, or the chunk under way."""

    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        handle = WorkerHandle(make_hello("prefill", capacity__is_first_come=is_first_come))
        fleet.add(handle)
        for attempt in (1, 2):
            handle.queue(attempt, PromptWork(3500, 0, 3.5), 100.0)
        [view] = fleet.scan().workers
        assert view.wait_s(100.0 + AGEING * 0.1, 100.0) == pytest.approx(wait_s)

    play(scene())
