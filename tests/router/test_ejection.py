"""Who fails again and again gets no work for a while; nobody is lost for ever, and no role is left without a worker."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import AdmissionLimits
from router.choice import Choice, RequestPlan
from router.ejection import (
    CIRCUIT,
    EJECTED_S,
    MAX_BACKOFF_S,
    MAX_EJECTED_S,
    MAX_FAILED,
    MAX_NAMES,
    Circuit,
    Ejections,
    is_workers_fault,
)
from router.fleet import Fleet
from router.placement import Rules
from router.retries import WorkerLost
from splitfire.core.errors import Internal, InvalidInput, SplitfireError, Unavailable
from splitfire.core.model_dir import ModelDir
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.checkpoints import PICO
from tests.router.fakes import FakeWorker, make_inside


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def attached() -> tuple[Ejections, Clock]:
    clock = Clock()
    ejections = Ejections(clock)
    ejections.attached("w")
    return ejections, clock


def fail(ejections: Ejections, times: int = MAX_FAILED, first: int = 1) -> None:
    for attempt in range(first, first + times):
        ejections.failed("w", attempt)


# -- the circuit alone


def test_five_failures_in_a_row_eject_and_a_success_between_does_not_let_them_add_up() -> None:
    ejections, _ = attached()
    fail(ejections, MAX_FAILED - 1)
    ejections.succeeded("w")
    fail(ejections, MAX_FAILED - 1)
    assert ejections.state("w") is Circuit.CLOSED
    assert ejections.failed("w", 99)
    assert ejections.state("w") is Circuit.EJECTED


def test_an_attempt_of_several_choices_fails_once() -> None:
    ejections, _ = attached()
    for _choice in range(8):
        ejections.failed("w", 7)
    assert ejections.state("w") is Circuit.CLOSED


def test_each_ejection_is_longer_until_it_is_forgiven() -> None:
    ejections, clock = attached()

    def lasts() -> float:
        began = clock.now
        while not ejections.is_due("w"):
            clock.now += 1.0
        return clock.now - began

    fail(ejections)
    assert lasts() == EJECTED_S
    ejections.probed("w", is_ok=False)
    assert lasts() == 2 * EJECTED_S
    ejections.probed("w", is_ok=True)
    fail(ejections, first=100)
    assert lasts() == 3 * EJECTED_S
    for _ in range(20):
        ejections.probed("w", is_ok=False)
        assert lasts() <= MAX_EJECTED_S
    ejections.probed("w", is_ok=True)
    clock.now += 3600.0
    fail(ejections, first=200)
    assert lasts() == EJECTED_S


@pytest.mark.parametrize("dies_idle", [False, True])
def test_crash_loop_backoff(dies_idle: bool) -> None:
    """F20: it dies 1 s after it is ready, or after its first work, and is ready again 1 s later. It gets work ever more rarely."""
    ejections, clock = attached()
    began, got_work = clock.now, []
    while clock.now < began + 600:
        has_work = ejections.state("w") is Circuit.CLOSED or ejections.is_due("w")
        if has_work:
            got_work.append(clock.now)
        clock.now += 1.0
        if has_work or dies_idle:
            ejections.died("w")
            clock.now += 1.0
            ejections.attached("w")
    gaps = [b - a for a, b in itertools.pairwise(got_work)]
    assert len(got_work) < 16, "of up to 300 lives"
    assert gaps == sorted(gaps)
    assert dies_idle or gaps[-1] >= MAX_BACKOFF_S


def test_one_death_costs_nothing_and_a_long_life_begins_anew() -> None:
    ejections, clock = attached()
    ejections.died("w")
    assert ejections.state("w") is Circuit.CLOSED
    ejections.attached("w")
    clock.now += 100.0
    ejections.died("w")
    ejections.attached("w")
    ejections.died("w")
    assert ejections.state("w") is Circuit.CLOSED
    ejections.attached("w")
    ejections.died("w")
    assert ejections.state("w") is Circuit.EJECTED


OPS = st.sampled_from(["attached", "died", "failed", "succeeded", "due", "ok", "bad", "second", "minute"])


@given(st.lists(OPS, min_size=20, max_size=60))
def test_no_order_of_events_leaves_a_worker_out_for_ever(ops: list[str]) -> None:
    """Whatever happened: once it answers canaries it gets work within the longest ejection. Nothing but a canary lets it in again."""
    ejections, clock = attached()
    calls: dict[str, Callable[[int], object]] = {
        "attached": lambda _: ejections.attached("w"),
        "died": lambda _: ejections.died("w"),
        "failed": lambda n: ejections.failed("w", n),
        "succeeded": lambda _: ejections.succeeded("w"),
        "due": lambda _: ejections.is_due("w"),
        "ok": lambda _: ejections.probed("w", is_ok=True),
        "bad": lambda _: ejections.probed("w", is_ok=False),
        "second": lambda _: setattr(clock, "now", clock.now + 1.0),
        "minute": lambda _: setattr(clock, "now", clock.now + 60.0),
    }
    for number, op in enumerate(ops, 1):
        before = ejections.state("w")
        calls[op](number)
        if before is not Circuit.CLOSED and ejections.state("w") is Circuit.CLOSED:
            assert (before, op) == (Circuit.PROBING, "ok")
    ejections.attached("w")
    clock.now += MAX_EJECTED_S
    if ejections.state("w") is not Circuit.CLOSED:
        assert ejections.is_due("w")
        ejections.probed("w", is_ok=True)
    assert ejections.state("w") is Circuit.CLOSED


def test_every_state_can_be_left() -> None:
    assert all(set(following.values()) - {state} for state, following in CIRCUIT.items())


def test_names_are_bounded() -> None:
    ejections, _ = attached()
    fail(ejections)
    for i in range(MAX_NAMES - 1):
        ejections.attached(f"other-{i}")
    assert ejections.state("w") is Circuit.EJECTED
    ejections.attached("one more")
    assert len(ejections._records) == MAX_NAMES
    assert ejections.state("w") is Circuit.CLOSED


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (Unavailable("", reason="handoff_failed"), True),
        (Unavailable("", reason="worker_protocol_error"), True),
        (Internal("", reason="nonfinite_logits"), True),
        (InvalidInput("prompt", "too long"), False),
        (WorkerLost("no_decode", is_death=True, was_computing=True), False),
        (Unavailable("", reason="draining"), False),
        (Unavailable("", reason="role_change"), False),
        (Unavailable("", reason="queue_full"), False),
    ],
)
def test_what_speaks_against_a_worker(error: SplitfireError, is_fault: bool) -> None:
    assert is_workers_fault(error) is is_fault


# -- in the fleet


def decodes(num: int) -> tuple[Fleet, list[FakeWorker]]:
    fleet = Fleet(ModelDir(PICO), lambda: None)
    return fleet, [FakeWorker(fleet, "decode", f"d{i}") for i in range(num)]


def eject(fleet: Fleet, worker: FakeWorker, first: int = 1000) -> None:
    for attempt in range(first, first + MAX_FAILED):
        fleet.guard.failed(attempt, [worker.handle.incarnation])


def able(fleet: Fleet) -> set[str]:
    names = {w.incarnation: w.hello.worker_id for w in fleet.workers}
    roles = fleet.scan().roles
    return {names[view.incarnation] for view in (*roles.prefills, *roles.decodes)}


def test_the_last_of_a_role_is_never_hidden() -> None:
    fleet, (d0, d1) = decodes(2)
    FakeWorker(fleet, "prefill", "p0")
    eject(fleet, d0)
    assert able(fleet) == {"d1", "p0"}
    eject(fleet, d1, 2000)
    assert able(fleet) == {"d0", "d1", "p0"}, "all of a role failed: better than nobody"


@pytest.mark.parametrize("how", ["dies", "drains", "is silent"])
def test_an_ejected_worker_is_taken_again_when_the_others_go(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, (d0, d1) = decodes(2)
    eject(fleet, d0)
    if how == "dies":
        d1.die()
    elif how == "drains":
        report = fleet_pb2.Load(is_draining=True, free_blocks=100)
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=d1.handle.incarnation, load=report))
    else:
        later = time.monotonic() + 5.0
        monkeypatch.setattr(time, "monotonic", lambda: later)
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=d0.handle.incarnation, load=fleet_pb2.Load(free_blocks=100)))
        fleet.drop_silent()
    assert able(fleet) == {"d0"}


def test_the_only_one_that_works_keeps_its_role() -> None:
    fleet, (d0, _) = decodes(2)
    eject(fleet, d0)
    with pytest.raises(InvalidInput, match="d1 is the last decode worker"):
        fleet.change_role("d1", inference_pb2.ROLE_PREFILL)


def test_a_worker_that_comes_back_under_its_name_is_still_out() -> None:
    fleet, (d0, _) = decodes(2)
    eject(fleet, d0)
    d0.die()
    again = FakeWorker(fleet, "decode", "d0")
    assert again.handle.is_ejected
    assert able(fleet) == {"d1"}


def test_a_worker_that_refuses_everything_is_soon_asked_nothing() -> None:
    """It always has room, so everything would go there: a black hole."""

    async def scene() -> None:
        inside = make_inside(AdmissionLimits(64, 64, 10**6, 60.0, 60.0), Rules("never"))
        bad, good = FakeWorker(inside.fleet, "decode", "bad"), FakeWorker(inside.fleet, "decode", "good")
        num_refused = 0
        for i in range(60):
            now = time.monotonic()
            plan = RequestPlan(f"r{i}", (5, 6, 7), SamplingParams(), StopParams(1), 2, "", "", now, now + 30.0)
            running = asyncio.create_task(inside.flow.run(Choice(plan, 0, asyncio.Event())))
            async with asyncio.timeout(10):
                while not running.done():
                    for submit in bad.submits():
                        num_refused += 1
                        bad.refuse(submit.attempt, "broken")
                    for submit in good.submits():
                        good.output(submit.attempt, 0, [9])
                        good.finish(submit.attempt, inference_pb2.FINISH_REASON_LENGTH)
                    await asyncio.sleep(0.001)
            await running
        assert num_refused == MAX_FAILED
        assert bad.handle.is_ejected

    asyncio.run(scene())
