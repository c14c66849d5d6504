"""GetFleet says what is true of each worker, and why requests went where they went, also when the workers are gone."""

from __future__ import annotations

import asyncio
import json
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from router.admission import AdmissionLimits
from router.choice import Choice, RequestPlan
from router.describe import Describer
from router.ejection import EJECTED_S, MAX_FAILED
from router.flow import Flow
from router.placement import Rules
from router.placing import MAX_DECISIONS
from splitfire.cli.render import decision_lines, fleet_table
from splitfire.core import limits
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.telemetry import Telemetry
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.router.fakes import FakeWorker, Inside, make_inside

LENGTH = inference_pb2.FINISH_REASON_LENGTH


def an_inside(rules: Rules) -> Inside:
    return make_inside(AdmissionLimits(200, 200, 10**6, 60.0, 60.0), rules)


async def ask(flow: Flow, request_id: str, prefill: FakeWorker, decode: FakeWorker, traceparent: str = "") -> None:
    """One request, answered by these two."""
    now = time.monotonic()
    plan = RequestPlan(request_id, tuple(range(70)), SamplingParams(), StopParams(2), 2, "", traceparent, now, now + 30.0)
    running = asyncio.create_task(flow.run(Choice(plan, 0, asyncio.Event())))
    async with asyncio.timeout(10):
        while not running.done():
            for submit in prefill.submits():
                prefill.output(submit.attempt, 0, [5])
                prefill.finish(submit.attempt)
            for submit in decode.submits():
                decode.output(submit.attempt, 0, [5, 6])
                decode.finish(submit.attempt, LENGTH)
            await asyncio.sleep(0.001)
    await running


def test_decisions_are_told_newest_first_with_the_parts_that_make_the_cost() -> None:
    async def scene() -> None:
        inside = an_inside(Rules("always"))
        prefill, decode = FakeWorker(inside.fleet, "prefill", "p0"), FakeWorker(inside.fleet, "decode", "d0")
        describe = Describer(inside.fleet, inside.placing, "cost", ["here:1"])
        for i in range(MAX_DECISIONS + 3):
            await ask(inside.flow, f"r{i}", prefill, decode)
        assert not describe().decisions
        told = describe(2)
        assert [decision.request_id for decision in told.decisions] == [f"r{MAX_DECISIONS + 2}", f"r{MAX_DECISIONS + 1}"]
        assert len(describe(1000).decisions) == MAX_DECISIONS
        assert list(told.worker_ports) == ["here:1"]
        taken = told.decisions[0].candidates[0]
        assert (taken.prefill_worker_id, taken.decode_worker_id) == ("p0", "d0")
        assert taken.cached_tokens == taken.present_tokens == 64, "as credited at dispatch"
        parts = taken.wait_s + taken.compute_s + taken.ship_s + taken.admit_s + taken.delay_s
        assert taken.cost_s == pytest.approx(parts)
        decode.die()
        gone = describe(1).decisions[0].candidates[0]
        assert (gone.prefill_worker_id, gone.decode_worker_id) == ("p0", decode.handle.incarnation.hex()[:8])

    asyncio.run(scene())


def test_the_span_of_placing_says_what_it_cost(tmp_path: Path) -> None:
    async def scene() -> None:
        inside = an_inside(Rules("always"))
        prefill, decode = FakeWorker(inside.fleet, "prefill", "p0"), FakeWorker(inside.fleet, "decode", "d0")
        telemetry = Telemetry("test", tmp_path / "trace.json")
        flow = Flow(inside.fleet, inside.admission, inside.placing, telemetry, 4096)
        trace = telemetry.begin_request("", time.monotonic())
        await ask(flow, "r", prefill, decode, trace.traceparent)
        telemetry.end_request(trace, time.monotonic(), {})
        telemetry.shutdown()

    asyncio.run(scene())
    [span] = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event["name"] == "place"]
    told = span["args"]
    assert told["splitfire.prefill_worker"] == "p0"
    parts = sum(told[f"splitfire.place.{part}_ms"] for part in ("wait", "compute", "ship", "admit", "delay"))
    assert told["splitfire.place.cost_ms"] == pytest.approx(parts, abs=0.01)
    assert told["splitfire.place.cached_tokens"] == 0


def test_a_workers_state_is_the_worst_that_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = an_inside(Rules())
    fleet = inside.fleet
    names = ("ready", "suspect", "silent", "ejected", "draining", "leaving")
    workers = {name: FakeWorker(fleet, "decode", name) for name in names}
    FakeWorker(fleet, "prefill", "last of its role")
    describe = Describer(fleet, inside.placing, "cost", [])
    now = time.monotonic() + limits.SUSPECT_AFTER_S + 1.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for worker in fleet.workers:
        if worker.hello.worker_id != "silent":
            load = fleet_pb2.Load(free_blocks=100, is_draining=worker.hello.worker_id == "draining")
            fleet.on_report(fleet_pb2.ReportRequest(incarnation=worker.incarnation, load=load))
    fleet.strike(workers["suspect"].handle.incarnation, "impossible_load")
    prefill = next(w for w in fleet.workers if w.is_prefill)
    for attempt in range(1, MAX_FAILED + 1):
        fleet.guard.failed(attempt, [workers["ejected"].handle.incarnation, prefill.incarnation])
    fleet.change_role("leaving", inference_pb2.ROLE_PREFILL)
    told = {worker.worker_id: worker.state for worker in describe().workers}
    expected = {name: name for name in names} | {"leaving": "draining", "last of its role": "suspect"}
    assert told == expected
    now += EJECTED_S
    assert fleet.guard.is_due(workers["ejected"].handle)
    assert {w.worker_id: w.state for w in describe().workers}["ejected"] == "probing"


@pytest.mark.parametrize(
    ("told", "believed"), [(0, 1), (2, 2), (limits.MAX_ROUTERS, 16), (limits.MAX_ROUTERS + 1, 16), (2**32 - 1, 16)]
)
def test_one_worker_cannot_make_everybodys_quota_nothing(told: int, believed: int) -> None:
    fleet = an_inside(Rules()).fleet
    assert fleet.num_routers == 1
    for name, num_routers in (("d0", 1), ("d1", told)):
        worker = FakeWorker(fleet, "decode", name)
        load = fleet_pb2.Load(free_blocks=100, num_routers=num_routers)
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=worker.handle.incarnation, load=load))
    assert fleet.num_routers == believed


def test_a_person_can_read_it() -> None:
    candidate = inference_pb2.Candidate(prefill_worker_id="p0", decode_worker_id="d0", cost_s=0.0523, compute_s=0.05, ship_s=0.0023)
    local = inference_pb2.Candidate(decode_worker_id="d1", cost_s=0.06, compute_s=0.06, cached_tokens=64, present_tokens=64)
    free = inference_pb2.Candidate(prefill_worker_id="p0")
    decision = inference_pb2.Decision(request_id="r", prompt_tokens=812, policy="cost", candidates=[candidate, local, free])
    assert decision_lines(decision) == [
        "r: 812 tokens, placed by cost",
        "  * p0 → d0: 52.3 ms = compute 50.0 + ship 2.3",
        "    d1: 60.0 ms = compute 60.0; 64 tokens cached, 64 at d1 already",
        "    p0: 0.0 ms = nothing",
    ]
    worker = inference_pb2.WorkerStatus(worker_id="w", role=inference_pb2.ROLE_DECODE, state="ejected")
    text = StringIO()
    Console(file=text, width=80).print(fleet_table(inference_pb2.GetFleetResponse(workers=[worker])))
    assert "ejected" in text.getvalue()
