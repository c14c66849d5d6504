"""Fairness between tenants of a class: the published bound, and the queue's order against one that is computed from scratch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fairness import OUTPUT_COST, FairOrder, Place
from router.waiting import BATCH, INTERACTIVE
from tests.router.test_admission import Desk

TENANTS = ("a", "b", "c")
WEIGHTS = st.sampled_from([0.5, 1.0, 3.0])


@dataclass(frozen=True)
class Shape:
    """What one request costs."""

    prompt: int
    output: int


SHAPES = st.lists(st.builds(Shape, st.integers(0, 5000), st.integers(0, 800)), min_size=1, max_size=5)


class Duel:
    """Two tenants with more to ask than the fleet can do: each start is followed by the next ask."""

    def __init__(self, shapes: dict[str, list[Shape]], weights: dict[str, float], num_slots: int) -> None:
        self.desk = Desk(max_running=1000, max_queued=1000)
        self.shapes = {tenant: deque(each) for tenant, each in shapes.items()}
        self.weights = weights
        self.num_slots = num_slots
        self.service = dict.fromkeys(shapes, 0.0)
        self.running: deque[tuple[str, Shape]] = deque()
        self.asked: dict[str, tuple[str, Shape]] = {}
        for tenant in shapes:
            for _ in range(3):
                self.ask(tenant)

    @property
    def lead(self) -> float:
        first, second = self.service.values()
        return first - second

    def ask(self, tenant: str) -> None:
        shape = self.shapes[tenant][0]
        self.shapes[tenant].rotate(-1)
        name = f"{tenant}{len(self.asked)}"
        self.asked[name] = tenant, shape
        self.desk.ask(name, tenant=tenant, weight=self.weights[tenant], num_tokens=shape.prompt, num_bytes=1)

    def start(self) -> None:
        [name] = self.desk.pump(1)
        tenant, shape = self.asked[name]
        self.service[tenant] += shape.prompt / self.weights[tenant]
        self.running.append((name, shape))
        self.ask(tenant)

    def finish(self) -> None:
        name, shape = self.running.popleft()
        tenant, _ = self.asked[name]
        self.desk.admission.charge(self.desk.tickets[name], shape.output)
        self.service[tenant] += OUTPUT_COST * shape.output / self.weights[tenant]
        self.desk.room = 0
        self.desk.admission.ended(tenant)


@settings(max_examples=120, deadline=None)
@given(st.tuples(SHAPES, SHAPES), st.tuples(WEIGHTS, WEIGHTS), st.integers(1, 4))
def test_vtc_bound_property(shapes: tuple[list[Shape], list[Shape]], weights: tuple[float, float], num_slots: int) -> None:
    """P16, F56: over any stretch of time, whatever the sizes. With one slot it is twice the largest request."""
    duel = Duel(dict(zip("ab", shapes, strict=True)), dict(zip("ab", weights, strict=True)), num_slots)
    largest = max(s.prompt for each in shapes for s in each) + num_slots * OUTPUT_COST * max(
        s.output for each in shapes for s in each
    )
    leads = [0.0]
    for _ in range(60):
        if len(duel.running) == num_slots:
            duel.finish()
            leads.append(duel.lead)
        duel.start()
        leads.append(duel.lead)
    assert max(leads) - min(leads) <= 2 * largest / min(weights) + 1e-6


def test_weights_are_shares() -> None:
    duel = Duel({"a": [Shape(100, 10)], "b": [Shape(700, 3)]}, {"a": 3.0, "b": 1.0}, 1)
    for _ in range(400):
        duel.start()
        duel.finish()
    got = {tenant: duel.service[tenant] * duel.weights[tenant] for tenant in "ab"}
    assert got["a"] / got["b"] == pytest.approx(3.0, rel=0.05)


def test_nobody_saves_up_while_it_asks_nothing() -> None:
    desk = Desk()
    for i in range(20):
        desk.ask(f"busy{i}", tenant="busy")
    desk.pump(10)
    for i in range(5):
        desk.ask(f"back{i}", tenant="back")
    assert desk.pump(4) == ["back0", "busy10", "back1", "busy11"]


def test_nor_when_the_queue_was_empty_in_between() -> None:
    """The newcomer starts where the last one left."""
    desk = Desk(room=9)
    for i in range(9):
        desk.ask(f"early{i}", tenant="early")
    for i in range(3):
        desk.ask(f"new{i}", tenant="new")
        desk.ask(f"more{i}", tenant="early")
    assert desk.pump(6) == ["more0", "new0", "more1", "new1", "more2", "new2"]


def test_what_a_tenant_gets_in_a_higher_class_costs_it_nothing_in_a_lower() -> None:
    desk = Desk(room=9)
    for i in range(9):
        desk.admission.charge(desk.ask(f"urgent{i}", tenant="a", priority=INTERACTIVE), 1000)
    for i in range(2):
        desk.ask(f"a{i}", tenant="a", priority=BATCH)
        desk.ask(f"b{i}", tenant="b", priority=BATCH)
    assert desk.pump(4) == ["a0", "b0", "a1", "b1"]


def test_what_comes_out_costs_twice_what_goes_in() -> None:
    desk = Desk(room=1)
    started = desk.ask("a0", tenant="a", num_tokens=0)
    for i in range(1, 4):
        desk.ask(f"a{i}", tenant="a", num_tokens=100)
        desk.ask(f"b{i}", tenant="b", num_tokens=100)
    desk.admission.charge(started, 75)
    assert desk.pump(6) == ["b1", "b2", "a1", "b3", "a2", "a3"]


def test_a_recomputed_prompt_is_not_held_against_the_tenant() -> None:
    """It was the fleet that lost it."""
    desk = Desk()
    desk.ask("resumed", tenant="a", is_resumed=True, num_tokens=5000)
    desk.ask("a", tenant="a")
    desk.ask("b", tenant="b")
    assert desk.pump(3) == ["resumed", "a", "b"]


# -- against orders that are computed from scratch


@st.composite
def queues(draw: st.DrawFn) -> tuple[FairOrder, dict[str, float], list[Place]]:
    """A queue some of whose places have come and gone, what each tenant got, and what waits."""
    queue = FairOrder()
    waiting: list[Place] = []
    weights = {tenant: draw(WEIGHTS) for tenant in TENANTS}
    got = dict.fromkeys(TENANTS, 0.0)
    for tenant in TENANTS:
        got[tenant] = float(draw(st.integers(0, 3000)))
        queue.charge(tenant, got[tenant])
    for number in range(draw(st.integers(1, 25))):
        tenant = draw(st.sampled_from(TENANTS))
        key = (float(draw(st.integers(0, 9))), number)
        place = Place(number, tenant, weights[tenant], 2, False, draw(st.integers(1, 500)), 1, 0.0, 60.0, key)
        holders = {other.tenant for other in waiting}
        if tenant not in holders:
            got[tenant] = max(got[tenant], min((got[other] for other in holders), default=0.0))
        queue.add(place)
        waiting.append(place)
        if draw(st.integers(0, 4)) == 0 and len(waiting) > 1:  # never the last: who comes next would begin where it left
            gone = draw(st.sampled_from(waiting))
            waiting.remove(gone)
            queue.remove(gone)
            got[gone.tenant] += gone.num_tokens / gone.weight
            queue.charge(gone.tenant, gone.num_tokens / gone.weight)
    return queue, got, waiting


@settings(max_examples=150, deadline=None)
@given(queues())
def test_the_order_is_that_of_serving_the_least_served_again_and_again(
    case: tuple[FairOrder, dict[str, float], list[Place]],
) -> None:
    queue, got, waiting = case
    expected, left, counters = [], list(waiting), dict(got)
    while left:
        place = min(left, key=lambda p: (counters[p.tenant], p.tenant, p.key))
        left.remove(place)
        expected.append(place.number)
        counters[place.tenant] += place.num_tokens / place.weight
    assert [place.number for place in queue.in_order(lambda _tenant: False)] == expected
    without = [n for n in expected if next(p for p in waiting if p.number == n).tenant != "a"]
    assert [place.number for place in queue.in_order(lambda tenant: tenant == "a")] == without
    assert queue.num_tokens == sum(place.num_tokens for place in waiting)


@settings(max_examples=150, deadline=None)
@given(queues())
def test_the_tokens_before_a_ticket_are_those_that_start_before_it(case: tuple[FairOrder, dict[str, float], list[Place]]) -> None:
    """To a ticket of each other tenant, because counters are compared before a ticket starts, not in the middle of it."""
    queue, _, waiting = case
    passed = 0
    for place in queue.in_order(lambda _tenant: False):
        largest = [
            max((p.num_tokens for p in waiting if p.tenant == tenant), default=0) for tenant in TENANTS if tenant != place.tenant
        ]
        assert abs(queue.tokens_before(place) - passed) <= sum(largest) + 1e-6
        passed += place.num_tokens


def test_the_queue_may_change_while_it_is_walked() -> None:
    queue = FairOrder()
    places = [Place(i, "ab"[i % 2], 1.0, 2, False, 10, 1, 0.0, 60.0, (float(i), i)) for i in range(8)]
    for place in places[:-1]:
        queue.add(place)
    walk = queue.in_order(lambda _tenant: False)
    assert next(walk) is places[0]
    queue.remove(places[0])
    queue.remove(places[1])
    assert next(walk) is places[3]
    queue.add(places[7])
    for gone in (places[2], places[3], places[4], places[6]):
        queue.remove(gone)
    assert [place.number for place in walk] == [5, 7]
