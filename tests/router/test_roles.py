"""Roles move when one side starves and the other could spare a worker, and otherwise not; what an operator may ask for."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from random import Random

import pytest

from router.fleet import LEAVE_WITHIN_S, ROLE_GRACE_S, Fleet
from router.roles import PAUSE_S, WINDOW_S, RoleChange, RolePolicy, WorkerUse
from splitfire.core.errors import InvalidInput, NotFound, SplitfireError, Unavailable
from splitfire.core.model_dir import ModelDir
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.checkpoints import PICO
from tests.router.fakes import FakeWorker

PREFILL, DECODE = inference_pb2.ROLE_PREFILL, inference_pb2.ROLE_DECODE
TARGET_S = 8.0


@dataclass
class Bench:
    """A fleet that is looked at every half second. A worker's role is in `roles`."""

    roles: dict[bytes, bool]
    policy: RolePolicy = field(default_factory=lambda: RolePolicy(TARGET_S))
    now: float = 0.0

    def look(self, wait_s: float, used: float, prefill_used: float = 0.0, queued_s: float = 0.0) -> RoleChange | None:
        self.now += 0.5
        uses = [
            WorkerUse(name, is_prefill, name[1], wait_s if is_prefill else 0.0, prefill_used if is_prefill else used)
            for name, is_prefill in self.roles.items()
        ]
        change = self.policy.look(self.now, uses, queued_s)
        if change is not None:
            assert self.roles[change.incarnation] is not change.to_prefill
            self.roles[change.incarnation] = change.to_prefill
            assert set(self.roles.values()) == {True, False}, "never below one of a role"
        return change

    def run(self, seconds: float, wait_s: float, used: float, prefill_used: float = 0.0) -> list[RoleChange]:
        changes = [self.look(wait_s, used, prefill_used) for _ in range(int(2 * seconds))]
        return [change for change in changes if change is not None]


def fleet_of(num_prefill: int, num_decode: int) -> Bench:
    return Bench({bytes([i < num_prefill, i]): i < num_prefill for i in range(num_prefill + num_decode)})


def test_a_starved_prefill_side_gets_the_least_busy_decode_worker() -> None:
    bench = fleet_of(1, 3)
    assert bench.run(PAUSE_S, 3.0, 0.3) == []
    assert bench.run(1.0, 3.0, 0.3) == [RoleChange(bytes([0, 1]), to_prefill=True)]


def test_a_starved_decode_side_gets_a_prefill_worker() -> None:
    bench = fleet_of(3, 1)
    assert bench.run(PAUSE_S + 1.0, 0.0, 0.95, 0.2) == [RoleChange(bytes([1, 0]), to_prefill=False)]


def test_prompts_that_wait_in_the_router_count() -> None:
    bench = fleet_of(1, 3)
    assert [change for _ in range(100) if (change := bench.look(0.0, 0.3, queued_s=3.0))]


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "wait_s", "used", "prefill_used"),
    [
        (1, 3, 1.9, 0.3, 1.0),  # a wait that is within the target
        (1, 3, 3.0, 0.6, 1.0),  # decode has not enough to spare
        (1, 1, 9.0, 0.0, 1.0),  # the last of its role
        (1, 2, 3.0, 0.49, 1.0),  # the one that is left would be full
        (2, 1, 0.0, 0.95, 0.5),  # the same, the other way round
        (3, 1, 1.0, 0.95, 0.2),  # both sides suffer
    ],
)
def test_nobody_is_moved_for_nothing(num_prefill: int, num_decode: int, wait_s: float, used: float, prefill_used: float) -> None:
    assert fleet_of(num_prefill, num_decode).run(300.0, wait_s, used, prefill_used) == []


def test_a_swing_shorter_than_the_window_moves_nobody() -> None:
    bench = fleet_of(1, 3)
    bench.run(PAUSE_S, 0.0, 0.3)
    for _ in range(30):
        assert bench.run(WINDOW_S - 1.0, 5.0, 0.3) == []
        assert bench.run(0.5, 0.0, 0.3) == []


def test_changes_are_rare_whatever_is_seen() -> None:
    random = Random(6)
    bench = fleet_of(4, 4)
    times = []
    for _ in range(200):
        wait_s, used, prefill_used = random.choice([0.0, 5.0]), random.choice([0.1, 0.95]), random.choice([0.0, 0.1, 1.0])
        for _ in range(30):
            if bench.look(wait_s, used, prefill_used) is not None:
                times.append(bench.now)
    assert len(times) > 5
    assert all(b - a >= PAUSE_S for a, b in itertools.pairwise(times))


def test_another_routers_change_stops_mine() -> None:
    bench = fleet_of(1, 4)
    bench.run(PAUSE_S - 1.0, 3.0, 0.1)
    bench.roles[bytes([0, 4])] = True
    assert bench.run(PAUSE_S - 1.0, 3.0, 0.1) == []


# -- on request


def a_fleet() -> tuple[Fleet, FakeWorker, FakeWorker, FakeWorker]:
    fleet = Fleet(ModelDir(PICO), lambda: None)
    return fleet, FakeWorker(fleet, "prefill", "p0"), FakeWorker(fleet, "decode", "d0"), FakeWorker(fleet, "decode", "d1")


def test_a_worker_is_told_once_and_gets_no_work_meanwhile() -> None:
    fleet, _, d0, _ = a_fleet()
    fleet.change_role("d0", PREFILL)
    assert d0.frames("change_role") == [fleet_pb2.ChangeRole(role=PREFILL, grace_s=ROLE_GRACE_S)]
    assert [view.can_take for view in fleet.scan().workers] == [True, False, True]
    with pytest.raises(Unavailable, match="leaving"):
        fleet.change_role("d0", PREFILL)


@pytest.mark.parametrize(
    ("name", "role", "error", "text"),
    [
        ("nobody", PREFILL, NotFound, "no worker is called nobody"),
        ("d0", DECODE, InvalidInput, "d0 is a decode worker already"),
        ("p0", DECODE, InvalidInput, "p0 is the last prefill worker"),
    ],
)
def test_what_cannot_be_asked_for(name: str, role: int, error: type[SplitfireError], text: str) -> None:
    fleet, *_ = a_fleet()
    with pytest.raises(error, match=text):
        fleet.change_role(name, role)  # type: ignore[arg-type]
    assert all(view.can_take for view in fleet.scan().workers)


def test_two_changes_at_once_leave_one_of_a_role() -> None:
    fleet, *_ = a_fleet()
    fleet.change_role("d0", PREFILL)
    with pytest.raises(InvalidInput, match="d1 is the last decode worker"):
        fleet.change_role("d1", PREFILL)


def test_leaving_for_another_role_is_no_death_and_introduces_the_worker_anew() -> None:
    fleet, p0, d0, d1 = a_fleet()
    fleet.change_role("d0", PREFILL)
    p0.taken(), d1.taken()
    d0.die()
    assert [gone.incarnation for gone in p0.frames("peer_gone")] == [d0.handle.incarnation]  # type: ignore[attr-defined]
    d0.handle.hello.role = PREFILL
    again = FakeWorker.__new__(FakeWorker)
    again.fleet, again.handle = fleet, type(d0.handle)(d0.handle.hello)
    fleet.add(again.handle)
    assert [up.peer.worker_id for up in d1.frames("peer_up")] == ["d0"]  # type: ignore[attr-defined]
    assert all(view.can_take for view in fleet.scan().workers)
    for _ in range(5):
        fleet.change_role("d0", DECODE if again.handle.is_prefill else PREFILL)
        fleet.remove(again.handle)
        again.handle.hello.role = DECODE if again.handle.is_prefill else PREFILL
        again.handle = type(d0.handle)(again.handle.hello)
        fleet.add(again.handle)
        assert not again.handle.is_ejected, "changing roles is no crash loop"


def test_a_worker_that_does_not_leave_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _, d0, _ = a_fleet()
    fleet.change_role("d0", PREFILL)
    fleet.drop_silent()
    assert not d0.handle.is_gone.is_set()
    later = time.monotonic() + ROLE_GRACE_S + LEAVE_WITHIN_S + 1.0
    d0.handle.reported_at = later
    monkeypatch.setattr(time, "monotonic", lambda: later)
    fleet.drop_silent()
    assert d0.handle.is_gone.is_set()
