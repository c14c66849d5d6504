"""Pairs a router knows: what may be believed, what is forgotten, and measuring that nobody can turn into a load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from router.fleet import Fleet
from router.pairs import Pair, Pairs, is_possible
from splitfire.core import limits
from splitfire.core.model_dir import ModelDir
from splitfire.v1 import fleet_pb2
from tests.checkpoints import PICO
from tests.router.fakes import FakeWorker, describe

P0, P1, D0, D1 = b"p0", b"p1", b"d0", b"d1"


def measured(peer: bytes = D0, **changes: Any) -> fleet_pb2.PairMeasurement:
    fields = dict(transport="ucx", path="shared memory", round_trip_s=1e-5, round_trip_p99_s=2e-5, bytes_per_s=8e9)
    return fleet_pb2.PairMeasurement(peer_incarnation=peer, **{**fields, **changes})


class Workers:
    """Answers what it is asked to measure, at once or never."""

    def __init__(self, pairs: Pairs, silent: frozenset[bytes] = frozenset()) -> None:
        self.pairs = pairs
        self.silent = silent
        self.asked: list[Pair] = []
        self.under_way: set[bytes] = set()

    def ask(self, prefill: bytes, decode: bytes) -> None:
        assert not self.under_way & {prefill, decode}, "it takes part in another measurement"
        self.asked.append(Pair(prefill, decode))
        if decode not in self.silent:
            self.under_way |= {prefill, decode}
            asyncio.get_running_loop().call_later(0.001, self._answer, Pair(prefill, decode))

    def _answer(self, pair: Pair) -> None:
        self.under_way -= {pair.prefill, pair.decode}
        self.pairs.record(pair, measured(pair.decode))


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.001)


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


ALL = [Pair(p, d) for p in (P0, P1) for d in (D0, D1)]


def test_every_pair_is_measured_and_no_worker_twice_at_once() -> None:
    async def scene() -> None:
        pairs = Pairs()
        workers = Workers(pairs)
        await pairs.measure(ALL, workers.ask)
        assert sorted(workers.asked, key=str) == sorted(ALL, key=str)
        assert {pair for pair, _ in pairs.items()} == set(ALL)

    run(scene)


def test_who_asks_again_within_a_second_shares_the_round() -> None:
    async def scene() -> None:
        now = [100.0]
        pairs = Pairs(lambda: now[0])
        workers = Workers(pairs)
        await asyncio.gather(*(pairs.measure(ALL, workers.ask) for _ in range(20)))
        await pairs.measure(ALL, workers.ask)
        assert len(workers.asked) == len(ALL)
        now[0] += limits.MEASURE_EVERY_S
        await pairs.measure(ALL, workers.ask)
        assert len(workers.asked) == 2 * len(ALL)

    run(scene)


def test_a_worker_that_does_not_answer_holds_up_only_its_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEASURE_PAIR_S", 0.05)

    async def scene() -> None:
        pairs = Pairs()
        await pairs.measure(ALL, Workers(pairs, frozenset({D0})).ask)
        assert {pair for pair, _ in pairs.items()} == {Pair(P0, D1), Pair(P1, D1)}

    run(scene)


def test_all_of_it_takes_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEASURE_TIMEOUT_S", 0.05)

    async def scene() -> None:
        pairs = Pairs()
        async with asyncio.timeout(1):
            await pairs.measure(ALL, Workers(pairs, frozenset({D0, D1})).ask)

    run(scene)


def test_a_worker_that_goes_is_not_waited_for() -> None:
    async def scene() -> None:
        pairs = Pairs()
        workers = Workers(pairs, frozenset({D0}))
        waiting = asyncio.ensure_future(pairs.measure([Pair(P0, D0)], workers.ask))
        await until(lambda: workers.asked)
        pairs.forget(D0)
        async with asyncio.timeout(limits.MEASURE_PAIR_S / 2):
            await waiting

    run(scene)


def test_an_old_measurement_sent_again_is_not_taken_for_the_new_one() -> None:
    """A worker that attaches tells every pair it knows."""

    async def scene() -> None:
        pairs = Pairs()
        workers = Workers(pairs, frozenset({D0}))
        waiting = asyncio.ensure_future(pairs.measure([Pair(P0, D0)], workers.ask))
        await until(lambda: workers.asked)
        pairs.record(Pair(P0, D0), measured(age_s=60.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        pairs.record(Pair(P0, D0), measured())
        async with asyncio.timeout(limits.MEASURE_PAIR_S / 2):
            await waiting

    run(scene)


def test_a_caller_that_hangs_up_does_not_end_the_round_for_others() -> None:
    async def scene() -> None:
        pairs = Pairs()
        workers = Workers(pairs)
        first = asyncio.ensure_future(pairs.measure(ALL, workers.ask))
        second: Awaitable[None] = asyncio.ensure_future(pairs.measure(ALL, workers.ask))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert len(list(pairs.items())) == len(ALL)

    run(scene)


@pytest.mark.parametrize(
    "field",
    [
        {"bytes_per_s": float("nan")}, {"bytes_per_s": float("inf")}, {"bytes_per_s": -1.0}, {"memcpy_bytes_per_s": 1e30},
        {"round_trip_s": -1.0}, {"round_trip_p99_s": float("nan")}, {"age_s": float("inf")}, {"path": "sneakernet"},
        {"transport": "x" * 33}, {"transport": "a\nb"},
    ],
)  # fmt: skip
def test_a_measurement_that_cannot_be_is_not_believed(field: dict[str, Any]) -> None:
    assert is_possible(measured())
    assert not is_possible(measured(**field))

    fleet = Fleet(ModelDir(PICO), lambda: None)
    prefill, decode = FakeWorker(fleet, "prefill"), FakeWorker(fleet, "decode")
    report = measured(decode.handle.incarnation, **field)
    fleet.on_report(fleet_pb2.ReportRequest(incarnation=prefill.handle.incarnation, pair=report))
    assert not list(fleet.pairs.items())
    assert prefill.handle.strikes == 1


def test_only_pairs_of_attached_workers_are_known() -> None:
    fleet = Fleet(ModelDir(PICO), lambda: None)
    prefill, other, decode = FakeWorker(fleet, "prefill"), FakeWorker(fleet, "prefill", "p1"), FakeWorker(fleet, "decode")
    for peer in b"x" * 16, other.handle.incarnation, decode.handle.incarnation:
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=prefill.handle.incarnation, pair=measured(peer)))
    fleet.on_report(fleet_pb2.ReportRequest(incarnation=decode.handle.incarnation, pair=measured(prefill.handle.incarnation)))
    [(pair, _)] = fleet.pairs.items()
    assert pair == Pair(prefill.handle.incarnation, decode.handle.incarnation)
    view = next(view for view in fleet.scan().workers if view.incarnation == prefill.handle.incarnation)
    assert view.peer_bytes_per_s == {decode.handle.incarnation: 8e9}
    decode.die()
    assert not list(fleet.pairs.items())


def test_measuring_asks_the_prefill_workers() -> None:
    async def scene() -> None:
        fleet = Fleet(ModelDir(PICO), lambda: None)
        prefill, decode = FakeWorker(fleet, "prefill"), FakeWorker(fleet, "decode")
        prefill.taken(), decode.taken()
        waiting = asyncio.ensure_future(fleet.measure_pairs())
        await until(lambda: prefill.handle.outbox.qsize())
        assert prefill.frames("measure") == [fleet_pb2.Measure(peer_incarnation=decode.handle.incarnation)]
        assert decode.taken() == []
        report = measured(decode.handle.incarnation, memcpy_bytes_per_s=16e9, age_s=0.0)
        fleet.on_report(fleet_pb2.ReportRequest(incarnation=prefill.handle.incarnation, pair=report))
        await waiting
        [pair] = describe(fleet).pairs
        assert (pair.bytes_per_s, pair.memcpy_bytes_per_s, pair.path) == (8e9, 16e9, "shared memory")
        assert 0 < pair.age_s < 1

    run(scene)
