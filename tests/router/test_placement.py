"""Placement: pure, so every case is a fleet and a demand."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from router.costs import PromptCost
from router.placement import LOCAL_MARGIN_S, Rules, missing_role, place, place_again, wait_behind
from router.policies import make_policy
from router.views import Decision, Demand, Placement, QueuedPrompt, Scan, WorkerView, roles_of

TOKEN_S = 1e-3
DEMAND = Demand(num_tokens=100)


def view(name: str, **changes: Any) -> WorkerView:
    """A worker that computes a token in a millisecond, and moves one of KV in a microsecond."""
    made = WorkerView(
        name.encode(), name.startswith("p"), can_take=True, num_running=0, max_running=4, free_tokens=3200, block_size=32,
        block_bytes=32_000, chunk_s=0.25, cost=PromptCost(token_s=TOKEN_S), step_s=0.01,
    )  # fmt: skip
    return replace(made, **changes)


def queued(*seconds: float) -> tuple[QueuedPrompt, ...]:
    """Prompts that came before any that a test places."""
    return tuple(QueuedPrompt(-1e6, each) for each in seconds)


def scan(*workers: WorkerView, now: float = 0.0) -> Scan:
    return Scan(workers, roles_of(workers), now)


def decide(*workers: WorkerView, demand: Demand = DEMAND, seed: int = 0, rules: Rules | None = None) -> Decision | None:
    return place(scan(*workers), demand, rules or Rules(), Random(seed))


def taken(*workers: WorkerView, demand: Demand = DEMAND, rules: Rules | None = None) -> set[Placement | None]:
    """What comes out, whatever is drawn; None: nothing that starts now."""
    found = [decide(*workers, demand=demand, seed=seed, rules=rules) for seed in range(100)]
    return {decision.placement if decision is not None and decision.starts_now else None for decision in found}


ALWAYS, NEVER = Rules("always"), Rules("never")


def test_the_shortest_wait_and_the_least_delay_win() -> None:
    fleet = view("p0", queue=queued(0.1)), view("p1", queue=queued(0.01)), view("d0", num_running=3), view("d1", num_running=1)
    assert taken(*fleet) == {Placement(b"p1", b"d1")}


def test_a_cached_prefix_is_worth_the_seconds_it_saves_and_no_more() -> None:
    """A hot prefix spills (F63): to compute 64 tokens takes as long as a wait of 64 ms."""
    demand = replace(DEMAND, depths={b"p1": 2})
    for wait_s, best in ((0.05, b"p1"), (0.08, b"p0")):
        fleet = view("p0"), view("p1", queue=queued(wait_s)), view("d0")
        assert taken(*fleet, demand=demand) == {Placement(best, b"d0")}


def test_one_token_is_computed_though_all_of_the_prompt_is_cached() -> None:
    decision = decide(view("p0"), view("d0"), demand=Demand(96, depths={b"p0": 3, b"d0": 3}))
    assert decision is not None
    assert decision.compute_s == pytest.approx(TOKEN_S)
    assert decision.explain(4)[0].cached_tokens == 95


def test_kv_that_decode_has_is_not_shipped() -> None:
    slow = view("p0", peer_bytes_per_s={b"d0": 1e6, b"d1": 1e6})  # a millisecond a token, as computing it
    assert taken(slow, view("d0"), view("d1"), demand=replace(DEMAND, depths={b"d1": 3}), rules=ALWAYS) == {Placement(b"p0", b"d1")}


def test_a_pair_that_is_slow_to_reach_costs_its_seconds() -> None:
    prefill = view("p0", peer_bytes_per_s={b"d0": 1e5, b"d1": 1e9})
    assert taken(prefill, view("d0"), view("d1"), rules=ALWAYS) == {Placement(b"p0", b"d1")}
    nearly = view("p0", peer_bytes_per_s={b"d0": 5e8, b"d1": 1e9})
    assert len(taken(nearly, view("d0"), view("d1"), rules=ALWAYS)) == 2, "a tenth of a millisecond is no difference"


def test_shipping_is_hidden_by_computing_but_for_the_last_chunk() -> None:
    prefill = view("p0", chunk_s=0.05, peer_bytes_per_s={b"d0": 1e6})
    decision = decide(prefill, view("d0"), rules=ALWAYS)
    assert decision is not None
    [candidate] = decision.explain(4)
    assert candidate.compute_s == pytest.approx(0.1)
    assert candidate.ship_s == pytest.approx(0.064)  # 128 tokens of whole blocks, half of them with the last chunk


class TestLocalPrefill:
    def test_where_nothing_is_gained_prefill_workers_compute(self) -> None:
        assert taken(view("p0"), view("d0")) == {Placement(b"p0", b"d0")}

    def test_decode_computes_what_it_has_in_its_cache(self) -> None:
        demand = Demand(1000, depths={b"d0": 30})
        assert taken(view("p0"), view("d0"), demand=demand) == {Placement(None, b"d0")}

    def test_but_not_where_many_would_wait_for_it(self) -> None:
        """440 tokens delay each of three sequences by 0.44 s; elsewhere they take 0.56 s longer."""
        demand = Demand(1000, depths={b"d0": 17})
        assert taken(view("p0"), view("d0", num_running=0), demand=demand) == {Placement(None, b"d0")}
        decision = decide(view("p0", chunk_s=2.0), view("d0", num_running=3), demand=demand)
        assert decision is not None
        assert decision.placement == Placement(b"p0", b"d0")

    def test_a_long_queue_makes_it_the_shorter_way(self) -> None:
        busy = view("p0", queue=queued(5.0))
        assert taken(busy, view("d0")) == {Placement(None, b"d0")}
        assert taken(busy, view("d0"), rules=ALWAYS) == {None}

    def test_its_cost_names_the_sequences_that_wait(self) -> None:
        decision = decide(view("d0", num_running=2))
        assert decision is not None
        [candidate] = decision.explain(4)
        assert candidate.delay_s == pytest.approx(2 * 0.01 + 2 * 0.1)
        assert candidate.cost_s == pytest.approx(0.1 + 0.22)
        decision = decide(view("p0", queue=queued(9.0)), view("d0"))
        assert decision is not None
        assert decision.explain(4)[0].delay_s == pytest.approx(LOCAL_MARGIN_S)


class TestRoles:
    @pytest.mark.parametrize(
        ("rules", "fleet", "expected"),
        [
            (NEVER, [view("p0"), view("d0")], Placement(None, b"d0")),
            (Rules(), [view("d0")], Placement(None, b"d0")),
            (Rules(), [view("p0", can_take=False), view("d0")], Placement(None, b"d0")),
            (Rules(local_fallback=False), [view("d0")], None),
            (ALWAYS, [view("d0")], None),
            (ALWAYS, [view("p0", can_take=False), view("d0")], None),
            (Rules(), [view("p0"), view("d0", num_running=4)], None),
            (ALWAYS, [view("p0", num_running=4), view("d0")], None),
            (NEVER, [view("d0", queue=queued(0.3))], None),  # its queue is longer than a chunk: wait here
            (Rules(), [view("p0")], None),
        ],
    )
    def test_who_computes_the_prompt(self, rules: Rules, fleet: list[WorkerView], expected: Placement | None) -> None:
        assert taken(*fleet, rules=rules) == {expected}

    @pytest.mark.parametrize(
        ("rules", "fleet", "reason"),
        [
            (Rules(), [], "no_decode"),
            (Rules(), [view("p0")], "no_decode"),
            (Rules(), [view("d0", can_take=False)], "no_decode"),
            (Rules(), [view("d0")], None),
            (Rules(local_fallback=False), [view("d0")], "no_prefill"),
            (ALWAYS, [view("d0")], "no_prefill"),
            (ALWAYS, [view("p0"), view("d0")], None),
            (NEVER, [view("d0", num_running=4)], None),
        ],
    )
    def test_what_is_missing_is_said(self, rules: Rules, fleet: list[WorkerView], reason: str | None) -> None:
        assert missing_role(fleet, rules) == reason

    def test_one_token_needs_no_decode_worker(self) -> None:
        demand = Demand(10, ends_with_first_token=True)
        assert taken(view("p0"), view("d0", num_running=4), demand=demand, rules=ALWAYS) == {Placement(b"p0", None)}


class TestTrust:
    def test_a_worker_that_failed_gets_nothing_while_another_is_merely_busy(self) -> None:
        """One that refuses fast always has room."""
        busy, failing = view("d0", num_running=4), view("d1")
        demand = replace(DEMAND, avoids=frozenset({b"d1"}))
        assert taken(view("p0"), busy, failing, demand=demand) == {None}
        assert taken(view("p0"), failing, demand=demand) == {Placement(b"p0", b"d1")}, "the last of a role"
        assert taken(view("p0"), busy, replace(failing, is_suspect=True)) == {None}

    def test_two_whose_transfer_broke_are_paired_only_if_there_is_nobody_else(self) -> None:
        """F31."""
        prefill = view("p0", bad_peers=frozenset({b"d0"}))
        assert taken(prefill, view("d0"), view("d1", num_running=3), rules=ALWAYS) == {Placement(b"p0", b"d1")}
        assert taken(prefill, view("d0"), rules=ALWAYS) == {Placement(b"p0", b"d0")}

    def test_who_runs_alone_gets_a_worker_without_anybody_and_nobody_else_gets_that(self) -> None:
        reserved = view("d1", is_reserved=True)
        alone = replace(DEMAND, is_alone=True)
        assert taken(view("p0"), view("d0", num_running=1), reserved, demand=alone) == {Placement(None, b"d1")}
        assert taken(view("p0"), view("d0", num_running=1), replace(reserved, num_running=1), demand=alone) == {None}
        assert taken(view("p0"), view("d0", num_running=3), reserved) == {Placement(b"p0", b"d0")}


class TestRoom:
    def test_what_decode_has_promised_is_not_there(self) -> None:
        assert taken(view("p0"), view("d0", free_tokens=99)) == {None}
        assert taken(view("p0"), view("d0", free_tokens=100)) == {Placement(b"p0", b"d0")}

    def test_room_that_will_be_there_when_the_prompt_is_computed_is_room(self) -> None:
        """Decode is looked at as it will be at the hand-off: else prefill idles while it empties, and floods it then."""
        freeing = view("d0", free_tokens=80, freed_tokens_per_s=1000.0)
        assert taken(view("p0"), freeing, rules=ALWAYS) == {Placement(b"p0", b"d0")}  # 32 tokens in 32 ms, of 100
        assert taken(view("p0"), replace(freeing, freed_tokens_per_s=500.0), rules=ALWAYS) == {None}

    def test_choices_need_a_lane_each(self) -> None:
        fleet = view("p0"), view("d0", num_running=2)
        assert taken(*fleet, demand=replace(DEMAND, num_choices=2)) == {Placement(b"p0", b"d0")}
        assert taken(*fleet, demand=replace(DEMAND, num_choices=3)) == {None}

    def test_the_next_room_of_a_closed_worker_is_somebody_elses(self) -> None:
        looked = scan(view("p0"), view("d0"))
        looked.closed.add(b"d0")
        assert place(looked, DEMAND, Rules(), Random(0)) is None


class TestQueues:
    def test_a_short_prompt_passes_a_long_one_but_not_in_the_middle_of_a_chunk(self) -> None:
        long = QueuedPrompt(key=0.0 + 3 * 8.0, seconds=8.0)
        worker = view("p0", queue=(long,))
        assert worker.wait_s(key=1.0, now=1.0) == pytest.approx(0.25)
        assert worker.wait_s(key=30.0, now=1.0) == pytest.approx(7.0)
        assert not worker.is_full(1.0)
        assert view("p0", queue=(long, *queued(0.3))).is_full(1.0)

    def test_what_is_computed_of_the_first_is_not_waited_for(self) -> None:
        worker = view("p0", queue=queued(1.0, 0.5), front_since=10.0)
        assert worker.wait_s(key=0.0, now=10.4) == pytest.approx(1.1)
        assert worker.wait_s(key=0.0, now=99.0) == pytest.approx(0.5), "it takes longer than foreseen"

    def test_what_other_routers_sent_counts(self) -> None:
        assert taken(view("p0", other_queue_s=0.2), view("p1"), view("d0")) == {Placement(b"p1", b"d0")}

    def test_who_waits_for_a_worker_is_ahead_of_those_looked_at_later(self) -> None:
        looked = scan(view("p0", queue=queued(0.3)), view("p1", queue=queued(0.5)), view("d0", num_running=3, free_tokens=10**6))
        first = place(looked, Demand(400), ALWAYS, Random(0))
        assert first is not None
        assert (first.placement.prefill, first.starts_now) == (b"p0", False)
        wait_behind(first, looked)
        second = place(looked, Demand(400), ALWAYS, Random(0))
        assert second is not None
        assert second.placement.prefill == b"p1"


def test_ties_are_broken_at_random() -> None:
    fleet = [view(f"{role}{i}") for role in "pd" for i in range(6)]
    found: Counter[Placement | None] = Counter()
    for seed in range(720):
        decision = decide(*fleet, seed=seed)
        found[decision.placement if decision is not None else None] += 1
    assert len(found) == 36
    assert min(found.values()) > 5


def test_a_session_goes_back_to_its_worker_unless_that_costs_more() -> None:
    demand = replace(DEMAND, prefers=frozenset({b"d1", b"p1"}))
    nearly = view("p0"), view("p1"), view("d0"), view("d1", num_running=1, step_s=0.005)
    assert taken(*nearly, demand=demand, rules=ALWAYS) == {Placement(b"p1", b"d1")}
    busy = view("p0"), view("p1", queue=queued(0.05)), view("d0"), view("d1", num_running=3)
    assert taken(*busy, demand=demand, rules=ALWAYS) == {Placement(b"p0", b"d0")}


def test_another_decode_worker_for_a_prompt_that_is_held() -> None:
    demand = replace(DEMAND, avoids=frozenset({b"d0"}))
    placed = Placement(b"p0", b"d0")
    fleet = scan(view("p0", queue=queued(9.0)), view("d0"), view("d1"))
    assert place_again(fleet, demand, placed, Random(0)) == Placement(b"p0", b"d1")
    assert place_again(scan(view("p0"), view("d0")), demand, placed, Random(0)) is None
    assert place_again(scan(view("p0"), view("d0"), view("d1", free_tokens=0)), demand, placed, Random(0)) is None
    assert place_again(scan(view("d0"), view("d1")), demand, placed, Random(0)) is None, "who held it is gone"


@pytest.mark.parametrize("name", ["round_robin", "least_loaded", "power_of_two", "random"])
def test_simple_policies_take_who_has_room(name: Any) -> None:
    rules = Rules(policy=make_policy(name))
    fleet = [view("p0", queue=queued(1.0)), view("p1"), view("p2"), view("d0", num_running=4), view("d1"), view("d2")]
    found = taken(*fleet, rules=rules)
    assert found == {Placement(p, d) for p in (b"p1", b"p2") for d in (b"d1", b"d2")} or name == "round_robin"
    assert all(p is not None and p.prefill != b"p0" and p.decode != b"d0" for p in found)
    assert taken(view("p0", queue=queued(1.0)), view("d0"), rules=rules) == {None}
    assert taken(view("d0"), rules=rules) == {Placement(None, b"d0")}


def test_round_robin_takes_each_in_turn() -> None:
    rules = Rules("never", policy=make_policy("round_robin"))
    fleet = [view("d0"), view("d1"), view("d2")]
    order = [decide(*fleet, rules=rules) for _ in range(6)]
    assert [d.placement.decode for d in order if d is not None] == [b"d0", b"d1", b"d2"] * 2


def test_the_example_in_the_documentation_is_true() -> None:
    """docs/router.md, One example."""
    cost = PromptCost(base_s=0.002, token_s=6e-5)
    rates = {b"d0": 2e9, b"d1": 2e9}
    prefill = view("p1", cost=cost, chunk_s=0.016, peer_bytes_per_s=rates, block_size=16, block_bytes=368_640)
    decode = view("d1", max_running=8, cost=cost, chunk_s=0.016, block_size=16, block_bytes=368_640)
    fleet = (
        prefill,
        replace(prefill, incarnation=b"p0", queue=queued(0.09)),
        decode,
        replace(decode, incarnation=b"d0", num_running=4, step_s=0.01),
    )
    demand = Demand(2000, depths={b"p0": 100, b"d0": 75})
    text = (Path(__file__).parents[2] / "docs" / "router.md").read_text()
    rows = re.findall(r"^\| `(\w\d)`(?:, `(\w\d)`| alone) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 6
    for first, second, numbers in rows:
        names = {first.encode(), second.encode()} - {b""}
        only = [v for v in fleet if v.incarnation in names]
        decision = decide(*only, demand=demand, rules=Rules("always" if second else "never"))
        assert decision is not None
        found = decision.explain(4)[0]
        margin_s = 0.0 if second else LOCAL_MARGIN_S  # that prefill workers are there
        parts = (found.wait_s, found.compute_s, found.ship_s, found.delay_s + margin_s, found.cost_s + margin_s)
        told = [float(part.strip(" *")) for part in numbers.split("|")]
        assert told == pytest.approx([1e3 * part for part in parts], abs=0.051), (first, second)
    best = decide(*fleet, demand=demand)
    assert best is not None
    assert best.placement == Placement(b"p1", b"d1")
    shorter = [replace(v, queue=queued(0.07)) if v.queue else v for v in fleet]
    best = decide(*shorter, demand=demand)
    assert best is not None
    assert best.placement == Placement(b"p0", b"d1")
