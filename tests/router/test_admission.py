"""Who may start, who waits, who is refused: one rule a test, a fleet that is a number."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from router.admission import LOOKAHEAD, Admission, AdmissionLimits, Ticket
from router.views import AGEING
from router.waiting import BATCH, INTERACTIVE, STANDARD, SYSTEM
from splitfire.core.errors import Code, DeadlineExceeded, Exhausted, Preempted, SplitfireError


@dataclass
class FakeScan:
    """What find_room was asked with, in order."""

    looked_at: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What a ticket may want to be different."""

    tenant: str = "default"
    weight: float = 1.0
    priority: int = STANDARD
    num_tokens: int = 100
    num_bytes: int = 10
    work_s: float = 0.0
    deadline: float | None = None
    is_resumed: bool = False
    max_running: int | None = None
    num_choices: int = 1
    on_start: Callable[[], None] = lambda: None


class Desk:
    """An admission whose fleet has room for `room` more tickets, but for those that are `busy`."""

    def __init__(self, room: int = 0, max_running: int = 100, max_queued: int = 100, max_queued_s: float = 60.0) -> None:
        self.now = 0.0
        self.room = room
        self.busy: set[str] = set()
        self.scans: list[FakeScan] = []
        self.started: list[str] = []
        self.told: dict[str, SplitfireError] = {}
        self.tickets: dict[str, Ticket[FakeScan, int]] = {}
        bounds = AdmissionLimits(max_running, max_queued, 1000 * max_queued, max_queued_s, ttft_target_s=2.0)
        self.admission: Admission[FakeScan, int] = Admission(bounds, lambda: self.now, self.begin_scan, Random(0))

    def begin_scan(self) -> FakeScan | None:
        if not self.room:
            return None
        self.scans.append(FakeScan())
        return self.scans[-1]

    def ask(self, name: str, wish: Wish | None = None, /, **wishes: object) -> Ticket[FakeScan, int]:
        wish = wish or Wish(**wishes)  # type: ignore[arg-type]

        def find_room(scan: FakeScan) -> int | None:
            assert scan is self.scans[-1]
            scan.looked_at.append(name)
            return self.room if self.room and name not in self.busy else None

        def start(room: int) -> int:
            assert room == self.room
            self.room -= 1
            self.started.append(name)
            wish.on_start()
            return wish.num_choices

        def expire(error: SplitfireError) -> None:
            assert name not in self.told
            self.told[name] = error

        ticket: Ticket[FakeScan, int] = Ticket(
            wish.tenant,
            wish.weight,
            wish.priority,
            wish.num_tokens,
            wish.num_bytes,
            wish.work_s,
            wish.deadline,
            wish.is_resumed,
            wish.max_running,
            find_room,
            start,
            expire,
        )
        self.tickets[name] = ticket
        self.admission.request(ticket)
        return ticket

    def refusal(self, name: str, **wishes: object) -> Exhausted:
        before = self.admission.num_queued, self.admission.queued_tokens, self.admission.queued_bytes
        with pytest.raises(Exhausted) as caught:
            self.ask(name, **wishes)
        assert caught.value.reason == "queue_full"
        assert (self.admission.num_queued, self.admission.queued_tokens, self.admission.queued_bytes) == before
        return caught.value

    def flood(self, name: str, **wishes: object) -> int:
        """Asks until it is refused: how many were not."""
        for i in range(1000):
            try:
                self.ask(f"{name}{i}", **wishes)
            except Exhausted:
                return i
        raise AssertionError("the flood was never refused")

    def end(self, name: str) -> None:
        self.room += 1
        self.admission.ended(self.tickets[name].tenant)

    def pump(self, room: int) -> list[str]:
        """Who starts when there is so much room, in order."""
        num_started, self.room = len(self.started), room
        self.admission.pump()
        return self.started[num_started:]


# -- order


def test_what_has_room_starts_at_once_and_the_rest_as_it_came() -> None:
    desk = Desk(room=1)
    for name in ("a", "b", "c"):
        desk.ask(name)
    assert desk.started == ["a"]
    desk.end("a")
    desk.end("b")
    assert desk.started == ["a", "b", "c"]
    desk.end("c")
    assert desk.admission.num_running == desk.admission.num_queued == desk.admission.queued_tokens == 0


def test_a_higher_class_overtakes_in_the_queue() -> None:
    desk = Desk()
    for priority in (BATCH, STANDARD, SYSTEM, INTERACTIVE):
        desk.ask(str(priority), priority=priority)
    assert desk.pump(4) == ["4", "3", "2", "1"]


def test_priority_floor_and_ageing() -> None:
    """F57: a flood of batch work keeps nobody above it out of queue or fleet, and starts itself though those above never stop coming."""
    desk = Desk(room=100, max_running=100, max_queued=100, max_queued_s=60.0)
    desk.flood("batch", priority=BATCH, tenant="flood")
    assert (desk.admission.num_running, desk.admission.num_queued) == (75, 50)
    desk.ask("urgent", priority=INTERACTIVE)
    assert desk.started[-1] == "urgent"
    first = "batch75"  # the oldest that waits
    desk.room = 0
    while first not in desk.started and desk.now < 60:
        desk.now += 0.5
        for i in range(2):  # as many as are served
            desk.ask(f"urgent{desk.now}.{i}", priority=INTERACTIVE)
        desk.room = 2
        for _ in range(2):
            desk.room -= 1
            desk.end("urgent")
    assert 30.0 <= desk.now <= 30.5  # level with interactive after half of the time it may wait


def test_system_work_is_never_caught_up_with() -> None:
    desk = Desk(max_queued_s=60.0)
    desk.ask("aged", priority=INTERACTIVE)
    desk.now = 59.0
    desk.ask("system", priority=SYSTEM)
    assert desk.pump(2) == ["system", "aged"]


def test_less_work_goes_first_but_passes_nobody_for_long() -> None:
    """Only what comes within AGEING times its own work passes a ticket."""
    desk = Desk()
    desk.ask("long", work_s=2.0)
    desk.now = 2.0 * AGEING - 0.1
    desk.ask("short in time", work_s=0.01)
    desk.now = 2.0 * AGEING + 0.1
    desk.ask("short but late", work_s=0.01)
    assert desk.pump(3) == ["short in time", "long", "short but late"]


def test_an_answer_under_way_goes_before_new_ones_of_its_class_whoever_asked() -> None:
    desk = Desk()
    desk.ask("new", tenant="a")
    desk.ask("resumed", tenant="b", is_resumed=True, work_s=9.0)
    desk.ask("urgent", tenant="a", priority=INTERACTIVE)
    assert desk.pump(3) == ["urgent", "resumed", "new"]


# -- the pump


def test_tickets_whose_worker_is_busy_are_passed_but_have_told_the_scan_in_order() -> None:
    desk = Desk()
    desk.busy = {"a", "b"}
    for name in ("a", "b", "c"):
        desk.ask(name)
    assert desk.pump(1) == ["c"]
    assert [scan.looked_at for scan in desk.scans] == [["a", "b", "c"]]


def test_one_pump_passes_only_so_many() -> None:
    desk = Desk()
    desk.busy = {str(i) for i in range(2 * LOOKAHEAD)}
    for name in [*sorted(desk.busy), "free"]:
        desk.ask(name)
    assert desk.pump(1) == []
    assert len(desk.scans[-1].looked_at) == LOOKAHEAD


def test_of_passed_tickets_tenants_take_turns() -> None:
    """One tenant with busy workers must not use up what a pump looks at."""
    desk = Desk()
    for i in range(LOOKAHEAD):
        desk.ask(f"a{i}", tenant="a")
        desk.busy.add(f"a{i}")
    desk.ask("b", tenant="b")
    assert desk.pump(1) == ["b"]
    assert desk.scans[-1].looked_at[:3] == ["a0", "b", "a1"]


def test_nobody_is_looked_at_when_the_fleet_or_the_limit_is_full() -> None:
    desk = Desk(max_running=1)
    desk.ask("a")
    assert desk.scans == []
    assert desk.pump(1) == ["a"]
    desk.ask("b")
    assert desk.pump(5) == []
    assert len(desk.scans) == 1


@pytest.mark.parametrize(("priority", "most"), [(BATCH, 15), (STANDARD, 19), (INTERACTIVE, 20), (SYSTEM, 20)])
def test_lower_classes_leave_places_in_the_fleet(priority: int, most: int) -> None:
    desk = Desk(room=30, max_running=20)
    for i in range(30):
        desk.ask(str(i), priority=priority)
    assert desk.admission.num_running == most


def test_a_tenant_at_its_quota_is_passed_over_however_much_it_has_waiting() -> None:
    desk = Desk()
    for i in range(3 * LOOKAHEAD // 2):
        desk.ask(f"a{i}", tenant="a", max_running=2)
    desk.ask("b", tenant="b")
    assert sorted(desk.pump(9)) == ["a0", "a1", "b"]
    desk.end("b")
    assert desk.started[3:] == []
    desk.end("a0")
    assert desk.started[3:] == ["a2"]


def test_all_choices_of_a_ticket_count() -> None:
    desk = Desk(room=5, max_running=8)
    desk.ask("group", num_choices=8)
    desk.ask("next")
    assert desk.admission.num_running == 8
    assert desk.started == ["group"]
    desk.end("group")
    assert desk.started == ["group", "next"]


def test_what_starts_may_bring_about_the_next_start() -> None:
    """Not within the first, or a long queue would be as deep a stack."""
    desk = Desk(max_running=3000, max_queued=3000)
    for i in range(2000):
        desk.ask(str(i), on_start=desk.admission.pump)
    assert desk.pump(2000) == [str(i) for i in range(2000)]


# -- what waited too long


def test_who_waited_too_long_is_told() -> None:
    desk = Desk(max_queued_s=5.0)
    desk.ask("a")
    desk.now = 4.9
    desk.ask("b")
    desk.now = 5.1
    assert desk.pump(2) == ["b"]
    error = desk.told["a"]
    assert isinstance(error, Exhausted)
    assert (error.reason, str(error)) == ("queue_full", "waited 5 s for a worker")
    assert error.retry_after_s is not None
    assert desk.admission.num_queued == 0


def test_what_is_past_its_deadline_is_dropped_before_it_is_computed() -> None:
    desk = Desk()
    desk.ask("late", deadline=3.0)
    desk.ask("in time", deadline=9.0)
    desk.now = 3.0
    assert desk.pump(2) == ["in time"]
    assert desk.scans[-1].looked_at == ["in time"]
    assert isinstance(desk.told["late"], DeadlineExceeded)
    assert desk.told["late"].reason == "queue"


def test_a_withdrawn_ticket_never_starts() -> None:
    desk = Desk()
    ticket = desk.ask("a")
    desk.admission.withdraw(ticket)
    desk.admission.withdraw(ticket)
    assert desk.pump(1) == []
    desk.now = 100.0
    desk.admission.pump()
    assert desk.told == {}
    assert desk.admission.queued_bytes == desk.admission.queued_tokens == desk.admission.queued_work_s == 0


def test_nothing_is_kept_of_those_who_left() -> None:
    """P14: timers and counters, however many requests there were."""
    desk = Desk(max_queued_s=3600.0)

    def come_and_go(count: int) -> None:
        for i in range(count):
            desk.admission.withdraw(desk.ask("x", deadline=3000.0 + i))

    come_and_go(500)
    tracemalloc.start()
    try:
        come_and_go(3000)
        assert tracemalloc.get_traced_memory()[0] < 30_000
    finally:
        tracemalloc.stop()


# -- bounds


@pytest.mark.parametrize(("priority", "most"), [(BATCH, 10), (STANDARD, 16), (INTERACTIVE, 19), (SYSTEM, 20)])
def test_the_bound_of_requests_is_exact(priority: int, most: int) -> None:
    desk = Desk(max_queued=20)
    for i in range(most):
        desk.ask(str(i), priority=priority)
    error = desk.refusal("over", priority=priority)
    assert str(error).startswith(f"{most} requests with {10 * most} bytes of token ids wait already, limits 20 and 20000")
    assert desk.told == {}


def test_the_smallest_queue_has_a_place_for_each_class() -> None:
    for priority in (BATCH, STANDARD, INTERACTIVE, SYSTEM):
        desk = Desk(max_queued=1)
        desk.ask("a", priority=priority)
        desk.refusal("b", priority=priority)
    Desk(max_queued=0).refusal("no queue")


def test_the_queue_is_bounded_in_bytes_too() -> None:
    desk = Desk(max_queued=10)
    desk.ask("a", num_bytes=7000)
    desk.ask("b", num_bytes=1000)
    desk.refusal("c", num_bytes=1)


def test_what_can_start_is_not_refused_by_a_full_queue() -> None:
    """Those who wait may wait for somebody else."""
    desk = Desk(max_queued=1)
    desk.ask("waits")
    desk.busy.add("waits")
    desk.room = 1
    desk.ask("starts")
    assert desk.started == ["starts"]


def test_who_would_wait_longer_than_the_target_is_refused_at_once_with_the_time() -> None:
    """P17: standard has 80 % of 2 s, a quarter of one at a worker. 100 tokens a ticket at 1000 a second: thirteen may wait before one."""
    desk = Desk(max_queued=1000)
    desk.admission.rate_tokens_per_s = 1000.0
    for i in range(14):
        desk.ask(str(i))
    error = desk.refusal("late")
    assert str(error).startswith("1400 prompt tokens are before it, 1.65 s at 1000 tokens/s; its class waits at most 1.6 s")
    assert error.retry_after_s is not None
    assert 1.4 * 0.75 <= error.retry_after_s <= 1.4 * 1.25
    assert len({desk.refusal(f"spread{i}").retry_after_s for i in range(9)}) == 9
    desk.ask("higher", priority=INTERACTIVE)  # those below are not before it
    desk.ask("another's", tenant="other")  # nor is all that one tenant has
    desk.ask("under way", is_resumed=True)
    desk.admission.rate_tokens_per_s = 0.0
    desk.ask("not known")


def test_a_short_prompt_waits_for_what_is_before_it_only() -> None:
    desk = Desk(max_queued=1000)
    desk.admission.rate_tokens_per_s = 1000.0
    for name in ("long", "long too"):
        desk.ask(name, num_tokens=1000, work_s=1.0)
    desk.refusal("as long", num_tokens=1000, work_s=1.0)
    desk.ask("short", num_tokens=10, work_s=0.01)


def test_a_prompt_that_is_long_itself_waits_for_an_idle_fleet() -> None:
    desk = Desk()
    desk.admission.rate_tokens_per_s = 10.0
    desk.ask("long", num_tokens=100_000)
    assert desk.admission.num_queued == 1


@pytest.mark.parametrize(
    ("tokens", "rate", "lowest", "highest"), [(10**9, 1.0, 60.0, 60.0), (10_000, 5.0, 60.0, 60.0), (100, 1e6, 0.1, 0.1)]
)
def test_hints_are_between_a_tenth_of_a_second_and_a_minute(tokens: int, rate: float, lowest: float, highest: float) -> None:
    desk = Desk(max_queued=2)
    for name in ("a", "b"):
        desk.ask(name, num_tokens=tokens)
    desk.admission.rate_tokens_per_s = rate
    hint = desk.refusal("c").retry_after_s
    assert hint is not None
    assert lowest <= hint <= highest


def test_answers_to_be_resumed_have_a_bound_of_their_own() -> None:
    desk = Desk(max_running=3, max_queued=2)
    for name in ("a", "b"):
        desk.ask(name)
    for i in range(3):
        desk.ask(f"resumed{i}", is_resumed=True)
    desk.refusal("resumed3", is_resumed=True)


# -- giving way


def test_the_newest_of_the_lowest_class_gives_way_to_a_higher() -> None:
    desk = Desk(max_queued=10)
    for name, priority in (
        ("b0", BATCH),
        ("b1", BATCH),
        ("s0", STANDARD),
        ("b2", BATCH),
        *((f"s{i}", STANDARD) for i in range(1, 5)),
    ):
        desk.ask(name, priority=priority)
    desk.ask("s5", priority=STANDARD)
    [(name, error)] = desk.told.items()
    assert name == "b2"
    assert isinstance(error, Preempted)
    assert (error.code, error.reason, error.is_retryable) == (Code.ABORTED, "preempted", True)
    assert desk.admission.num_queued == 8
    for i in range(4):
        desk.ask(f"i{i}", priority=INTERACTIVE)
    assert list(desk.told) == ["b2", "b1", "b0"], "two more fit; then the rest of batch"


def test_a_class_keeps_a_few_places_whatever_comes() -> None:
    desk = Desk(max_queued=100)
    for i in range(50):
        desk.ask(f"batch{i}", priority=BATCH)
    for i in range(75):
        desk.ask(f"standard{i}")
    assert len(desk.told) == 45
    desk.refusal("standard75")
    assert desk.admission.num_queued == 80


def test_who_resumes_gives_way_to_nobody() -> None:
    desk = Desk(max_queued=2)
    desk.ask("resumed", priority=BATCH, is_resumed=True)
    for name in ("a", "b"):
        desk.ask(name, priority=SYSTEM)
    desk.refusal("c", priority=SYSTEM)
    assert desk.told == {}


def test_a_request_bigger_than_the_queue_drives_nobody_out() -> None:
    """F27: in vain, that is."""
    desk = Desk(max_queued=10)
    for i in range(5):
        desk.ask(str(i), priority=BATCH, num_bytes=100)
    desk.refusal("huge", priority=INTERACTIVE, num_bytes=9501)
    assert desk.told == {}
    desk.ask("big", priority=INTERACTIVE, num_bytes=9200)
    assert list(desk.told) == ["4", "3"], "of 9500 bytes 300 are left"


def test_a_flood_of_one_tenant_keeps_no_other_out_of_the_queue() -> None:
    """F56: by requests, and by bytes."""
    for num_bytes in (10, 5000):
        desk = Desk(max_queued=50)
        accepted = desk.flood("flood", tenant="flood", num_bytes=num_bytes)
        for i in range(20):
            desk.ask(f"other{i}", tenant="other")
        assert set(desk.told) == {f"flood{accepted - 1 - i}" for i in range(len(desk.told))}, "the newest"
        desk.refusal("flood again", tenant="flood", num_bytes=num_bytes)
    assert len(desk.told) == 1, "one that is large makes place for many that are small"


def test_two_tenants_with_equal_shares_do_not_drive_each_other_out() -> None:
    desk = Desk(max_queued=10)
    for i in range(4):
        desk.ask(f"a{i}", tenant="a")
        desk.ask(f"b{i}", tenant="b")
    desk.refusal("a4", tenant="a")
    desk.refusal("b4", tenant="b")
    desk.refusal("half a share", tenant="c", weight=0.1)
    desk.ask("heavier", tenant="d", weight=10.0)
    assert len(desk.told) == 1


def test_a_small_share_is_not_driven_out_for_a_large_one() -> None:
    desk = Desk(max_queued=10)
    for i in range(8):
        desk.ask(f"a{i}", tenant="a", num_bytes=1000)
    desk.refusal("more than a's", tenant="b", num_bytes=7000)
    assert desk.told == {}
    desk.ask("half", tenant="b", num_bytes=4000)
    assert list(desk.told) == ["a7", "a6", "a5", "a4"]
