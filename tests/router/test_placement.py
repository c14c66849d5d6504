"""Placement and admission: pure, so every case is a table row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from router.admission import Admission, AdmissionLimits, Ticket
from router.placement import Demand, Placement, WorkerView, missing_role, place
from splitfire.core.errors import Exhausted

DEMAND = Demand(num_tokens=100, ends_with_first_token=False)


def view(name: str, *, running: int = 0, queued: int = 0, can_take: bool = True, max_running: int = 4) -> WorkerView:
    return WorkerView(
        name.encode(),
        name.startswith("p"),
        can_take,
        running,
        queued,
        max_running,
        chunk_tokens=256,
        block_size=32,
        free_blocks=100,
    )


def test_the_least_loaded_worker_of_each_role_is_taken() -> None:
    fleet = [view("p0", queued=100), view("p1", queued=10), view("d0", running=3), view("d1", running=1)]
    assert place(fleet, DEMAND, "auto", Random(0)) == Placement(b"p1", b"d1")


def test_a_worker_that_failed_gets_nothing_while_another_is_merely_busy() -> None:
    """One that refuses fast always has room."""
    busy, failing = view("d0", running=8), view("d1")
    demand = replace(DEMAND, avoids=frozenset({b"d1"}))
    assert place([view("p0"), busy, failing], demand, "auto", Random(0)) is None
    assert place([view("p0"), failing], demand, "auto", Random(0)) == Placement(b"p0", b"d1"), "the last of a role"
    suspect = replace(failing, is_suspect=True)
    assert place([view("p0"), busy, suspect], DEMAND, "auto", Random(0)) is None


def test_always_split_never_computes_a_prompt_on_decode() -> None:
    assert place([view("d0")], DEMAND, "always", Random(0)) is None
    assert place([view("p0", can_take=False), view("d0")], DEMAND, "always", Random(0)) is None
    assert place([view("p0", can_take=False), view("d0")], DEMAND, "auto", Random(0)) == Placement(None, b"d0")


@pytest.mark.parametrize(
    ("rates", "taken"),
    [
        ({b"d0": 8e9, b"d1": 2e9, b"d2": 8e9}, {b"d0", b"d2"}),  # d1 is four times as slow
        ({b"d0": 8e9, b"d1": 2.1e9, b"d2": 8e9}, {b"d0", b"d1", b"d2"}),  # what is less is noise
        ({b"d0": 8e9, b"d1": 1e9}, {b"d0", b"d2"}),  # d2 was not measured
        ({}, {b"d0", b"d1", b"d2"}),
        ({b"d0": 0.0, b"d1": 0.0, b"d2": 0.0}, {b"d0", b"d1", b"d2"}),
    ],
)
def test_of_equally_busy_decode_workers_a_much_slower_one_is_left_out(rates: dict[bytes, float], taken: set[bytes]) -> None:
    prefill = replace(view("p0"), peer_bytes_per_s=rates)
    fleet = [prefill, view("d0"), view("d1"), view("d2"), view("d3", running=1)]
    found = [place(fleet, DEMAND, "always", Random(seed)) for seed in range(100)]
    assert {placement.decode for placement in found if placement is not None} == taken


def test_a_slow_way_is_better_than_a_busy_worker() -> None:
    prefill = replace(view("p0"), peer_bytes_per_s={b"d0": 1e9, b"d1": 8e9})
    assert place([prefill, view("d0"), view("d1", running=1)], DEMAND, "always", Random(0)) == Placement(b"p0", b"d0")


def test_ties_are_broken_at_random() -> None:
    fleet = [view("p0"), view("p1"), view("d0"), view("d1")]
    found = Counter(place(fleet, DEMAND, "always", Random(seed)) for seed in range(200))
    assert len(found) == 4
    assert min(found.values()) > 20


@pytest.mark.parametrize(
    ("split", "fleet", "expected"),
    [
        ("never", [view("p0"), view("d0")], Placement(None, b"d0")),
        ("auto", [view("d0")], Placement(None, b"d0")),
        ("auto", [view("p0", can_take=False), view("d0")], Placement(None, b"d0")),
        ("auto", [view("p0"), view("d0")], Placement(b"p0", b"d0")),
        ("auto", [view("p0", queued=300), view("d0")], None),  # its queue is longer than a chunk: wait here
        ("auto", [view("p0"), view("d0", running=4)], None),
        ("auto", [view("p0", running=4), view("d0")], None),
        ("never", [view("d0", queued=256)], None),
        ("auto", [view("p0")], None),
    ],
)
def test_who_computes_the_prompt(split: str, fleet: list[WorkerView], expected: Placement | None) -> None:
    assert place(fleet, DEMAND, split, Random(0)) == expected  # type: ignore[arg-type]


def test_one_token_needs_no_decode_worker() -> None:
    assert place([view("p0"), view("d0", running=4)], Demand(10, True), "always", Random(0)) == Placement(b"p0", None)


def test_a_session_goes_back_to_its_worker_unless_that_is_busier() -> None:
    demand = Demand(10, False, frozenset({b"d1", b"p1"}))
    idle = [view("p0"), view("p1"), view("d0"), view("d1", running=1)]
    assert all(place(idle, demand, "auto", Random(s)) == Placement(b"p1", b"d1") for s in range(20))
    busy = [view("p0"), view("p1", can_take=False), view("d0"), view("d1", running=3)]
    assert all(place(busy, demand, "auto", Random(s)) == Placement(b"p0", b"d0") for s in range(20))


@pytest.mark.parametrize(
    ("split", "fleet", "reason"),
    [
        ("auto", [], "no_decode"),
        ("auto", [view("p0")], "no_decode"),
        ("auto", [view("d0", can_take=False)], "no_decode"),
        ("always", [view("d0")], "no_prefill"),
        ("always", [view("p0"), view("d0")], None),
        ("never", [view("d0", running=4)], None),
    ],
)
def test_what_is_missing_is_said(split: str, fleet: list[WorkerView], reason: str | None) -> None:
    assert missing_role(fleet, split) == reason  # type: ignore[arg-type]


class Desk:
    """An admission whose room is a number."""

    def __init__(self, room: int, max_queued: int = 3, max_queued_s: float = 60.0) -> None:
        self.now = 0.0
        self.room = room
        self.started: list[str] = []
        self.expired: list[str] = []
        self.admission: Admission[int] = Admission(AdmissionLimits(100, max_queued, 1000, max_queued_s), lambda: self.now)

    def ask(self, name: str, priority: int = 2, num_bytes: int = 10) -> Ticket[int]:
        def start(room: int) -> int:
            self.room -= 1
            self.started.append(name)
            return 1

        ticket = Ticket(priority, num_bytes, lambda: self.room or None, start, lambda _error: self.expired.append(name))
        self.admission.request(ticket)
        return ticket

    def end(self) -> None:
        self.room += 1
        self.admission.ended()


def test_what_has_room_starts_at_once_and_the_rest_in_order() -> None:
    desk = Desk(room=1)
    for name in ("a", "b", "c"):
        desk.ask(name)
    assert desk.started == ["a"]
    desk.end()
    desk.end()
    assert desk.started == ["a", "b", "c"]


def test_a_higher_class_overtakes_in_the_queue() -> None:
    desk = Desk(room=0)
    desk.ask("batch", priority=1)
    desk.ask("standard", priority=2)
    desk.ask("interactive", priority=3)
    desk.room = 3
    desk.admission.pump()
    assert desk.started == ["interactive", "standard", "batch"]


def test_a_full_queue_refuses_at_once_and_forgets() -> None:
    """F53: the limit is exact, and a refusal leaves nothing behind."""
    desk = Desk(room=0, max_queued=2)
    desk.ask("a")
    desk.ask("b")
    with pytest.raises(Exhausted) as caught:
        desk.ask("c")
    assert caught.value.reason == "queue_full"
    assert caught.value.retry_after_s is not None
    assert desk.admission.num_queued == 2


def test_the_queue_is_bounded_in_bytes_too() -> None:
    desk = Desk(room=0)
    desk.ask("a", num_bytes=900)
    with pytest.raises(Exhausted):
        desk.ask("b", num_bytes=200)


def test_who_waited_too_long_is_told() -> None:
    desk = Desk(room=0, max_queued_s=5.0)
    desk.ask("a")
    desk.now = 5.1
    desk.admission.pump()
    assert desk.expired == ["a"]
    assert desk.admission.num_queued == 0


def test_a_withdrawn_ticket_never_starts() -> None:
    desk = Desk(room=0)
    ticket = desk.ask("a")
    desk.admission.withdraw(ticket)
    desk.admission.withdraw(ticket)
    desk.room = 1
    desk.admission.pump()
    assert desk.started == []
