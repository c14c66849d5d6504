"""The real router rules over simulated workers: the numbers that placement has to reach, and nothing lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.simulation import w8, workloads
from router.simulation.fleet import Setup, SimulatedFleet, simulate
from router.simulation.result import Result, mean_of, result_of
from splitfire.core.errors import ConfigError
from splitfire.core.workload_trace import Arrival, Trace


def serve(trace: Trace, setup: Setup) -> Result:
    fleet = SimulatedFleet(trace, setup)
    fleet.run()
    for worker in fleet.workers.values():
        worker.pool.check()
        assert worker.pool.num_filling == 0 and worker.pool.num_available == worker.pool.num_blocks, "somebody still has blocks"
        assert not worker.view(0.0, {}, is_eager=False).queue and not worker.view(0.0, {}, is_eager=False).num_running
    for job in fleet.jobs:
        assert job.first_s is not None and job.started_s is not None and job.ended_s is not None
        assert job.arrival.at_s <= job.dispatched_s <= job.started_s < job.first_s <= job.ended_s
    return result_of(fleet)


def w8_mean(speed: float = 1.0, blocks: int = w8.CACHE_BLOCKS, seeds: int = 2, **setup: object) -> Result:
    engine = w8.engine(blocks)
    return mean_of([serve(w8.w8(seed).at_rate(speed), Setup(engine, 0, 4, **setup)) for seed in range(seeds)])  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_result() -> None:
    setup = Setup(w8.engine(), 2, 2, seed=3)
    assert serve(w8.w8(3), setup) == serve(w8.w8(3), setup)
    assert w8.w8(3) != w8.w8(4)


def test_w8_is_placed_nearly_as_well_as_with_one_cache_for_all() -> None:
    cost, oracle = w8_mean(), w8_mean(is_shared=True)
    assert oracle.hit_rate == pytest.approx(0.68, abs=0.01), "the workload is not the one that was measured with"
    assert cost.hit_rate >= 0.64
    assert cost.ttft.p99 <= 1.05 * oracle.ttft.p99
    assert cost.ttft.mean <= 1.3 * oracle.ttft.mean


def test_w8_twice_as_fast_does_not_make_queues() -> None:
    cost, in_turn = w8_mean(2.0), w8_mean(2.0, policy="round_robin")
    assert cost.ttft.p99 <= 0.40 * in_turn.ttft.p99
    assert cost.hit_rate >= 0.64


def test_w8_with_small_caches_still_finds_them() -> None:
    assert w8_mean(blocks=600).hit_rate >= 0.55


def test_w8_split_finds_what_one_prefill_cache_would() -> None:
    engine = w8.engine()
    cost = serve(w8.w8(0), Setup(engine, 2, 2))
    in_turn = serve(w8.w8(0), Setup(engine, 2, 2, policy="round_robin", is_eager=True))
    assert cost.hit_rate >= in_turn.hit_rate + 0.1
    assert cost.ttft.p99 <= 0.5 * in_turn.ttft.p99


@pytest.mark.parametrize("chat", [workloads.CONVERSATION, workloads.TOOLAGENT])
def test_a_busy_fleet_keeps_hits_and_balance(chat: workloads.Chat) -> None:
    trace = workloads.generate(chat, 0, 1000)
    engine = workloads.large_engine(int(trace.num_blocks * 0.3 / 8))
    trace = workloads.at_load(trace, engine, 8, 0.8)
    cost, oracle = serve(trace, Setup(engine, 0, 8)), serve(trace, Setup(engine, 0, 8, is_shared=True))
    assert cost.hit_rate >= 0.95 * oracle.hit_rate
    assert cost.imbalance <= 0.15, "0.10 and less with the whole hour"
    assert cost.ttft.p90 <= 1.25 * oracle.ttft.p90, "those that wait for a worker are not counted as its queue"


def test_engines_that_share_steps_and_run_out_of_room_lose_nothing() -> None:
    """Pools so small that prompts and hand-offs wait for one another."""
    engine = replace(w8.engine(), num_blocks=200, max_cached=None, shares_steps=True, is_fifo=False)
    trace = replace(w8.w8(1), arrivals=w8.w8(1).arrivals[:150])
    for num_prefill in (0, 2):
        serve(trace, Setup(engine, num_prefill, 4 - num_prefill))


def test_a_request_that_fits_nowhere_is_refused_before_anything_runs() -> None:
    trace = Trace("t", 16, [Arrival(0.0, 1000, 100, tuple(range(62)))])
    with pytest.raises(ConfigError, match="1100 tokens, prompt and answer, but a worker has room for 1024"):
        SimulatedFleet(trace, Setup(replace(w8.engine(), num_blocks=64), 0, 1))


def test_workers_of_one_machine_slow_one_another_down_by_as_much_as_they_are_busy() -> None:
    """Split, steps take longer by a part of what they would beside prompts without end; without prefill workers nothing changes."""
    trace = workloads.generate(workloads.CONVERSATION, 0, 200)
    engine = workloads.large_engine(trace.num_blocks)
    trace = workloads.at_load(trace, engine, 2, 0.5)
    slowed = replace(engine, step_beside=2.0)
    alone, beside = (result_of(simulate(trace, Setup(each, 2, 2))) for each in (engine, slowed))
    assert 1.1 < beside.itl.mean / alone.itl.mean < 2.0
    assert beside.ttft.mean == pytest.approx(alone.ttft.mean, rel=0.1)
    assert result_of(simulate(trace, Setup(slowed, 0, 4))) == result_of(simulate(trace, Setup(engine, 0, 4)))
