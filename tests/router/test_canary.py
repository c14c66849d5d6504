"""Canaries: straight to one worker, never a client's, at most one at a time, over after three seconds; and none where nobody asked."""

from __future__ import annotations

import time

import pytest

from router.canary import IDLE_S, TIMEOUT_S, Canaries
from router.ejection import EJECTED_S, MAX_FAILED
from router.fleet import Fleet
from splitfire.core.model_dir import ModelDir
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.checkpoints import PICO
from tests.router.fakes import LAYOUT, FakeWorker

LENGTH = inference_pb2.FINISH_REASON_LENGTH


class Bench:
    """A prefill worker and two decode workers, and a clock that is jumped. Who lives reports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tries_idle: bool = False) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.fleet = Fleet(ModelDir(PICO), lambda: None)
        self.prefill = FakeWorker(self.fleet, "prefill", "p0")
        self.bad, self.good = FakeWorker(self.fleet, "decode", "bad"), FakeWorker(self.fleet, "decode", "good")
        self.workers = [self.prefill, self.bad, self.good]
        self.canaries = Canaries(self.fleet, lambda: self.now, tries_idle=tries_idle)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.fleet.workers:
            load = fleet_pb2.Load(free_blocks=100, total_blocks=100)
            self.fleet.on_report(fleet_pb2.ReportRequest(incarnation=worker.incarnation, load=load))
        self.canaries.look()

    def eject(self, worker: FakeWorker) -> None:
        for attempt in range(10_000, 10_000 + MAX_FAILED):
            self.fleet.guard.failed(attempt, [worker.handle.incarnation])
        assert not self.can_take(worker)

    def can_take(self, worker: FakeWorker) -> bool:
        return next(view for view in self.fleet.scan().workers if view.incarnation == worker.handle.incarnation).can_take

    def probe(self) -> fleet_pb2.Submit:
        """Of the bad worker, which is out: until its canary is there."""
        self.eject(self.bad)
        self.pass_time(EJECTED_S - 1.0)
        assert not any(worker.submits() for worker in self.workers)
        self.pass_time(2.0)
        assert not self.prefill.submits()
        assert not self.good.submits()
        [submit] = self.bad.submits()
        return submit

    def assert_nothing_open(self) -> None:
        assert not any(w.handle.attempts or w.handle.prompts or w.handle.promised or w.handle.num_tokens for w in self.workers)


def test_an_ejected_worker_that_answers_its_canary_gets_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    submit = bench.probe()
    assert len(submit.prompt_token_ids) < LAYOUT.block_size, "what could be cached proves nothing"
    assert (submit.part, submit.stopping.max_tokens) == (fleet_pb2.PART_WHOLE, 1)
    bench.pass_time(1.0)
    assert not bench.bad.submits(), "one at a time"
    bench.bad.output(submit.attempt, 0, [3])
    assert not bench.can_take(bench.bad)
    bench.bad.finish(submit.attempt, LENGTH)
    assert bench.can_take(bench.bad)
    bench.assert_nothing_open()


@pytest.mark.parametrize("how", ["refuses", "says nothing", "ends without a token"])
def test_an_ejected_worker_that_fails_its_canary_stays_out_for_longer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    submit = bench.probe()
    if how == "refuses":
        bench.bad.refuse(submit.attempt, "broken")
    elif how == "ends without a token":
        bench.bad.finish(submit.attempt, LENGTH)
    else:
        bench.pass_time(TIMEOUT_S - 0.1)
        assert bench.bad.handle.attempts
        bench.pass_time(0.2)
        assert bench.bad.frames("cancel")
    bench.assert_nothing_open()
    bench.pass_time(2 * EJECTED_S - 1.0)
    assert not bench.can_take(bench.bad)
    assert not bench.bad.submits()
    bench.pass_time(1.1)
    assert bench.bad.submits()


@pytest.mark.parametrize("is_drained", [False, True])
def test_a_worker_that_goes_with_its_canary_is_probed_when_it_is_back(is_drained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.pass_time(100.0)  # no crash loop
    bench.probe()
    bench.bad.handle.load.is_draining = is_drained
    bench.bad.die()
    bench.pass_time(2 * EJECTED_S)
    again = bench.bad = bench.workers[1] = FakeWorker(bench.fleet, "decode", "bad")
    assert not bench.can_take(again)
    bench.pass_time(1.0)
    [submit] = again.submits()
    again.output(submit.attempt, 0, [3])
    again.finish(submit.attempt, LENGTH)
    assert bench.can_take(again)
    bench.assert_nothing_open()


def test_a_prefill_worker_is_asked_for_a_first_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.workers.append(FakeWorker(bench.fleet, "prefill", "p1"))
    bench.eject(bench.prefill)
    bench.pass_time(EJECTED_S + 1.0)
    [submit] = bench.prefill.submits()
    assert submit.part == fleet_pb2.PART_PREFILL
    assert not submit.HasField("handoff")


def test_an_idle_fleet_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    for _ in range(20):
        bench.pass_time(IDLE_S)
    assert not any(worker.submits() for worker in bench.workers)


def test_idle_workers_are_tried_where_that_is_asked_for_and_one_that_fails_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, tries_idle=True)
    bench.pass_time(IDLE_S - 1.0)
    assert not any(worker.submits() for worker in bench.workers)
    bench.pass_time(2.0)
    for worker in bench.workers:
        [submit] = worker.submits()
        if worker is not bench.bad:
            worker.output(submit.attempt, 0, [3])
            worker.finish(submit.attempt, LENGTH)
    bench.pass_time(TIMEOUT_S)
    assert bench.can_take(bench.good)
    assert not bench.can_take(bench.bad)
    bench.assert_nothing_open()
