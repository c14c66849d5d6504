"""Faults of requests with several choices, in the simulator: the prompt is computed and moved once, and whatever happens to that or
to one of them, each gets its own tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.faults.sims import at_payload, fleet, until
from tests.faults.test_handoff import freeze_for, watch_silence
from tests.model.clock import play
from tests.model.simulator import Simulation, WorkerPlan


async def some_requests(sim: Simulation, hold_s: float = 1.0) -> None:
    sim.ask_together(3, 30)
    sim.ask(47)
    sim.ask_together(2, 64)
    await sim.finish(hold_s=hold_s)


def num_events() -> int:
    count = 0

    async def scene() -> None:
        nonlocal count
        async with fleet() as sim:

            def seen() -> None:
                nonlocal count
                count += 1

            sim.net.on_event = seen
            await some_requests(sim)

    play(scene())
    return count


def act_at(number: int, victim: str, act: Callable[[Simulation, str], None]) -> None:
    async def scene() -> None:
        async with fleet() as sim:
            seen = 0

            def count() -> None:
                nonlocal seen
                seen += 1
                if seen == number:
                    asyncio.get_running_loop().call_soon(act, sim, victim)

            sim.net.on_event = count
            await some_requests(sim, hold_s=20.0)

    play(scene())


def test_without_a_fault_the_prompt_is_computed_and_moved_once() -> None:
    async def scene() -> None:
        async with fleet(prefill=1, decode=1) as sim:
            asked = sim.ask_together(4, 43, 20)
            await sim.finish()
            prefill, decode = sim.workers["p0"], sim.workers["d0"]
            assert prefill.host.engine._sequences._arrivals == 1
            assert sum(decode.decode._context.tally.endings.values()) == 1
            assert {a.choice.timeline.kv_transfer.blocks for a in asked if a.choice.timeline.kv_transfer} == {6}
            assert len({tuple(a.choice.ids) for a in asked}) == 4

    play(scene())


@pytest.mark.parametrize("victim", ["p0", "p1", "d0", "d1"])
def test_a_crash_at_any_step_changes_no_token_and_leaks_nothing(victim: str) -> None:
    for number in range(1, num_events(), 9):
        act_at(number, victim, Simulation.kill)


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_worker_that_freezes_and_comes_back_is_fenced(victim: str) -> None:
    for number in range(1, num_events(), 25):
        act_at(number, victim, freeze_for(5.0))


@pytest.mark.parametrize("who", [[0], [2], [0, 1], [0, 1, 2]])
def test_a_choice_that_is_cancelled_at_any_step_leaves_the_others(who: list[int]) -> None:
    for number in range(1, num_events(), 12):

        def cancel(sim: Simulation, _name: str) -> None:
            for i in who:
                sim.asked[i].task.cancel()

        act_at(number, "", cancel)


def test_a_hand_off_that_fails_goes_elsewhere_with_all_its_choices_and_nothing_is_computed_again() -> None:
    async def scene() -> None:
        async with fleet(prefill=1, decode=2) as sim:
            asked = sim.ask_together(3, 60, 10)
            at_payload(sim, 2, lambda: sim.kill(next(n for n, w in sim.workers.items() if len(w.agent._incoming)), None))
            await sim.finish(hold_s=20.0)
            assert sim.workers["p0"].host.engine._sequences._arrivals == 1
            assert all(a.choice.failed_at for a in asked)

    play(scene())


def test_corrupt_kv_is_computed_again_for_each_choice() -> None:
    async def scene() -> None:
        async with fleet() as sim:
            damaged = False

            def damage(message: memoryview) -> None:
                nonlocal damaged
                if not damaged and len(message) > 300:
                    damaged = True
                    message[-1] ^= 1

            sim.net.damage = damage
            sim.ask_together(3, 60)
            await sim.finish(hold_s=5.0)
            assert damaged

    play(scene())


@pytest.mark.parametrize("num_blocks", [10, 12, 16])
@pytest.mark.parametrize("max_running", [1, 2, 8])
def test_forks_that_cannot_run_together_take_turns(num_blocks: int, max_running: int) -> None:
    """Preempted, or without a lane: nobody is forgotten, and nobody gets another's tokens."""

    async def scene() -> None:
        plan = WorkerPlan("decode", num_blocks=num_blocks, max_running=max_running)
        async with fleet(prefill=1, decode=[plan]) as sim:
            sim.ask_together(4, 43, 24)
            sim.ask_together(2, 30, 30)
            sim.ask(20, 20)
            await sim.finish(hold_s=5.0)

    play(scene())


def test_preempted_forks_survive_the_death_of_their_worker() -> None:
    """F80 with forks."""

    async def scene() -> None:
        async with fleet(decode=[WorkerPlan("decode", num_blocks=14), WorkerPlan("decode", num_blocks=64)]) as sim:
            for _ in range(2):
                sim.ask_together(3, 40, 30, seed=5)
            await until(lambda: sim.workers["d0"].host.engine._scheduler.num_preemptions)
            sim.kill("d0")
            await sim.finish(hold_s=20.0)

    play(scene())


def test_all_choices_of_a_request_keep_its_deadline() -> None:
    async def scene() -> None:
        async with fleet() as sim:
            asked = sim.ask_together(3, 40, 400, deadline_s=1.0)
            await sim.finish(may_fail=True, hold_s=1.0)
            assert [a.error.code.name for a in asked if a.error] == ["DEADLINE_EXCEEDED"] * 3
            watch_silence(sim)

    play(scene())
