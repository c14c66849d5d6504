"""Admission under any sequence of operations: every ticket has one end, every bound holds after every step, nothing is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.admission import LOOKAHEAD
from router.bounds import QUEUE_PERCENT, part_of
from router.running import RUNNING_PERCENT
from splitfire.core.errors import Exhausted, Preempted
from tests.router.test_admission import Desk, Wish

MAX_RUNNING, MAX_QUEUED, MAX_QUEUED_S = 8, 12, 20.0
QUOTAS = {"a": None, "b": 2, "c": None}
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 4.0}
WISHES = st.builds(
    lambda tenant, **rest: Wish(tenant=tenant, weight=WEIGHTS[tenant], max_running=QUOTAS[tenant], **rest),
    tenant=st.sampled_from(sorted(QUOTAS)),
    priority=st.integers(1, 4),
    num_tokens=st.integers(0, 1000),
    num_bytes=st.integers(0, 3000),
    work_s=st.floats(0.0, 5.0),
    is_resumed=st.integers(0, 9).map(lambda n: n == 0),
    num_choices=st.sampled_from([1, 1, 1, 3]),
)


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(max_running=MAX_RUNNING, max_queued=MAX_QUEUED, max_queued_s=MAX_QUEUED_S)
        self.wishes: dict[str, Wish] = {}
        self.expires: dict[str, float] = {}
        self.refused: set[str] = set()
        self.withdrawn: set[str] = set()
        self.running: list[str] = []  # a name for each choice
        self.num_requests = 0

    @property
    def waiting(self) -> list[str]:
        over = self.refused | self.withdrawn | set(self.desk.started) | set(self.desk.told)
        return [name for name in self.wishes if name not in over]

    @rule(wish=WISHES, patience=st.none() | st.floats(0.0, 30.0))
    def request(self, wish: Wish, patience: float | None) -> None:
        name = f"r{self.num_requests}"
        self.num_requests += 1

        def on_start() -> None:
            assert self.desk.now < self.expires[name]
            assert not {name} & (self.refused | self.withdrawn | set(self.desk.told))
            self.running += [name] * wish.num_choices

        deadline = None if patience is None else self.desk.now + patience
        self.wishes[name] = wish
        self.expires[name] = min(self.desk.now + MAX_QUEUED_S, float("inf") if deadline is None else deadline)
        try:
            self.desk.ask(name, replace(wish, deadline=deadline, on_start=on_start))
        except Exhausted:
            self.refused.add(name)

    @precondition(lambda self: self.wishes)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """Of anything, whatever became of it."""
        name = data.draw(st.sampled_from(sorted(self.wishes)))
        if name in self.waiting:
            self.withdrawn.add(name)
        self.desk.admission.withdraw(self.desk.tickets[name])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), output=st.integers(0, 500), frees=st.booleans())
    def end(self, data: st.DataObject, output: int, frees: bool) -> None:
        name = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.desk.admission.charge(self.desk.tickets[name], output)
        self.desk.room += frees
        self.desk.admission.ended(self.wishes[name].tenant)

    @rule(seconds=st.floats(0.0, 8.0), room=st.integers(0, 5))
    def tick(self, seconds: float, room: int) -> None:
        self.desk.now += seconds
        self.desk.pump(room)
        assert all(self.expires[name] > self.desk.now for name in self.waiting)

    @rule(rate=st.sampled_from([0.0, 100.0, 1000.0]))
    def measure(self, rate: float) -> None:
        self.desk.admission.rate_tokens_per_s = rate

    @invariant()
    def counts_are_true(self) -> None:
        admission, waiting = self.desk.admission, [self.wishes[name] for name in self.waiting]
        assert admission.num_running == len(self.running)
        assert admission.num_queued == len(waiting)
        assert admission.queued_tokens == sum(wish.num_tokens for wish in waiting)
        assert admission.queued_bytes == sum(wish.num_bytes for wish in waiting if not wish.is_resumed)
        assert admission.queued_work_s == pytest.approx(sum(wish.work_s for wish in waiting), abs=1e-6)

    @invariant()
    def every_ticket_has_one_end(self) -> None:
        ends = [*self.refused, *self.withdrawn, *self.desk.started, *self.desk.told]
        assert len(ends) == len(set(ends))
        assert not any(self.wishes[name].is_resumed for name, error in self.desk.told.items() if isinstance(error, Preempted))

    @invariant()
    def no_class_holds_more_than_its_part(self) -> None:
        waiting = [self.wishes[name] for name in self.waiting if not self.wishes[name].is_resumed]
        for priority, percent in QUEUE_PERCENT.items():
            held = [wish for wish in waiting if wish.priority <= priority]
            assert len(held) <= part_of(MAX_QUEUED, percent)
            assert sum(wish.num_bytes for wish in held) <= part_of(1000 * MAX_QUEUED, percent)
        assert self.desk.admission.num_running < MAX_RUNNING + 3
        assert sum(self.wishes[name].tenant == "b" for name in self.running) < 2 + 3

    @invariant()
    def nobody_waits_who_could_start(self) -> None:
        assert len(self.waiting) <= LOOKAHEAD
        for name in self.waiting if self.desk.room else ():
            wish = self.wishes[name]
            is_at_quota = wish.tenant == "b" and sum(self.wishes[n].tenant == "b" for n in self.running) >= 2
            assert is_at_quota or len(self.running) >= part_of(MAX_RUNNING, RUNNING_PERCENT[wish.priority])

    def teardown(self) -> None:
        for name in self.waiting:
            self.desk.admission.withdraw(self.desk.tickets[name])
            self.withdrawn.add(name)
        while self.running:
            self.desk.admission.ended(self.wishes[self.running.pop()].tenant)
        admission = self.desk.admission
        assert admission.num_running == admission.num_queued == admission.queued_tokens == admission.queued_bytes == 0
        assert admission.queued_work_s == 0


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
