"""The router's own rows of the fault matrix: what it does when load, luck or a request is bad. The real flow, virtual time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from splitfire.core.errors import Exhausted, SplitfireError
from tests.faults.sims import fleet, until
from tests.model.clock import play
from tests.model.simulator import LAYOUT, Asked, Simulation, WorkerPlan


def ttft_s(asked: Asked) -> float:
    timeline = asked.choice.timeline
    assert timeline.first_token_at is not None
    return timeline.first_token_at - asked.choice.plan.accepted_at


def test_query_of_death_kills_at_most_three() -> None:
    """F21: it runs beside others twice, then alone, and then not at all; the others lose nothing but time."""

    async def scene() -> None:
        async with fleet(prefill=3, decode=3) as sim:
            poison = sim.ask(40, 5, seed=99)
            sim.is_poison = lambda spec: spec.prompt == poison.prompt
            others = [sim.ask(30 + i, 20, seed=i) for i in range(12)]
            killed: list[str] = []
            kill = sim.kill
            sim.kill = lambda name, restart_s=0.5: (killed.append(name), kill(name, restart_s))  # type: ignore[assignment, func-returns-value]
            for asked in others:
                await asked.task
            error = None
            try:
                await poison.task
            except SplitfireError as exc:
                error = exc
            assert error is not None
            assert (error.reason, error.is_retryable) == ("request_suspected_poison", False)
            assert len(killed) == 3
            assert all(len(a.choice.ids) == 20 for a in others)
            sim.asked.remove(poison)
            await sim.finish(hold_s=20.0)

    play(scene())


def test_internal_retry_budget() -> None:
    """F55: no hand-off works, for anybody. Attempts are a tenth more than requests, and what was saved up; not three times as many."""

    async def scene() -> None:
        async with fleet(prefill=2, decode=2) as sim:
            count = 0
            begin = sim.fleet.begin

            def counted(*args: object, **kwargs: object) -> int:
                nonlocal count
                count += 1
                return begin(*args, **kwargs)  # type: ignore[arg-type]

            sim.fleet.begin = counted  # type: ignore[method-assign]

            def damage(message: memoryview) -> None:
                message[-1] ^= 1

            sim.net.damage = damage
            num_asked = 150
            for i in range(num_asked):
                sim.ask(20, 3, seed=i, deadline_s=30.0)
                await asyncio.sleep(0.02)
            failed = 0
            for asked in sim.asked:
                try:
                    await asked.task
                except SplitfireError as exc:
                    failed += 1
                    assert exc.is_retryable
            assert failed == num_asked
            assert num_asked <= count <= num_asked * 1.1 + 10, count
            sim.asked.clear()
            sim.net.damage = lambda message: None
            await sim.finish(hold_s=20.0)

    play(scene())


async def pour(sim: Simulation, every_s: float, seconds: float, first_seed: int) -> tuple[list[Asked], int]:
    """Requests at a steady rate; those that were let in, and how many were refused."""
    poured: list[Asked] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        poured.append(sim.ask(60, 4, seed=first_seed + len(poured), deadline_s=30.0))
        await asyncio.sleep(every_s)
    let_in: list[Asked] = []
    refused = 0
    for asked in poured:
        try:
            await asked.task
            let_in.append(asked)
        except Exhausted as exc:
            assert exc.retry_after_s is not None
            refused += 1
            sim.asked.remove(asked)
    return let_in, refused


def test_overload_recovery() -> None:
    """F53, F54: at four times the load as many requests are served as at best, those in time, and all is well soon after."""

    async def scene() -> None:
        plan = WorkerPlan("prefill", num_blocks=256, chunk_tokens=64, step_s=0.05)
        decode = WorkerPlan("decode", num_blocks=256, step_s=0.005, max_running=32)
        async with fleet(prefill=[plan], decode=[decode]) as sim:
            sim.admission.limits = replace(sim.admission.limits, ttft_target_s=2.0)
            at_best, _ = await pour(sim, 0.06, 10.0, first_seed=1000)
            await pour(sim, 0.06 / 4, 6.0, first_seed=8000)  # how fast the queue drains shows when there is one
            overloaded, refused = await pour(sim, 0.06 / 4, 20.0, first_seed=2000)
            assert refused > 0
            assert len(overloaded) / 20.0 >= 0.9 * len(at_best) / 10.0
            late = sorted(map(ttft_s, overloaded))
            assert late[int(0.99 * len(late))] <= 2.0
            after, refused = await pour(sim, 0.1, 5.0, first_seed=9000)
            assert refused == 0
            assert max(map(ttft_s, after)) <= 2 * max(map(ttft_s, at_best))
            await sim.finish(hold_s=2.0)

    play(scene())


def test_hot_prefix_spills() -> None:
    """F63: everybody has the same long prefix, and asks five times as often as who has it first can answer: it does not get all the work."""

    async def scene() -> None:
        plan = WorkerPlan("prefill", num_blocks=400, chunk_tokens=16, step_s=0.02)
        async with fleet(prefill=[plan] * 3, decode=[WorkerPlan("decode", num_blocks=2000, max_running=64)] * 2) as sim:
            first = sim.ask(160, 2, seed=7)
            await first.task
            for i in range(80):
                sim.ask(170 + i % 40, 4, seed=7)
                await asyncio.sleep(0.004)
            await sim.finish()
            cached = sum(a.choice.timeline.cached_tokens for a in sim.asked[1:])
            assert cached > 0.6 * sum(len(a.prompt) for a in sim.asked[1:]), "and yet it is found in caches most of the time"
            filled = [w.host.engine.blocks.num_indexed for w in sim.workers.values() if w.name.startswith("p")]
            assert min(filled) >= 160 // LAYOUT.block_size

    play(scene())


def test_stale_index_is_only_a_miss() -> None:
    """F59: the router hears nothing of what caches lose, and sends prompts where nothing is any more. Tokens are right, and nobody dies."""

    async def scene() -> None:
        plans = [WorkerPlan("prefill", num_blocks=24)] * 2, [WorkerPlan("decode", num_blocks=64)] * 2
        async with fleet(prefill=plans[0], decode=plans[1]) as sim:
            await asyncio.sleep(1.0)
            sim.net.loses_report = lambda: True
            for i in range(40):
                asked = sim.ask(80 + i, 3, seed=i % 4)
                await asked.task
            await sim.finish()
            assert not any(a.choice.failed_at for a in sim.asked)

    play(scene())


def test_a_worker_that_dies_soon_after_every_start_gets_ever_less() -> None:
    """F20: the request that it gets goes on elsewhere; it is not asked again until its time is over, and another one never pays for it."""

    async def scene() -> None:
        async with fleet(prefill=1, decode=2) as sim:
            deaths = 0

            async def crash_loop() -> None:
                nonlocal deaths
                while True:
                    await asyncio.sleep(1.0)
                    if sim.workers["d1"].handle.attempts:
                        deaths += 1
                        sim.kill("d1", restart_s=0.1)

            looping = asyncio.create_task(crash_loop())
            for i in range(300):
                sim.ask(20, 30, seed=i)
                await asyncio.sleep(0.1)
            looping.cancel()
            await until(lambda: all(a.task.done() for a in sim.asked), 60.0)
            await sim.finish(hold_s=20.0)
            assert 2 <= deaths <= 4, "thirty seconds, and it was tried a few times"

    play(scene())
