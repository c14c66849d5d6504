"""Faults of a hand-off, in the simulator: whatever happens, the tokens are right, every request ends, and nothing is held.

Names are those of the fault matrix. `Simulation.finish` checks the promises; tests here say when and where it hurts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import pytest

from kvtransfer.frames import PAYLOAD, parse_frame, parse_payload
from kvtransfer.protocol import Recv, Send
from splitfire.core import limits
from splitfire.core.errors import Code
from splitfire.engine.updates import StepResult
from tests.faults.sims import at_payload, fleet, receiver_of, sender_of, until
from tests.model.clock import play
from tests.model.simulator import LAYOUT, Simulation, WorkerPlan


def num_events(seed: int = 1) -> int:
    """Deliveries of the run that the crashes below are spread over."""
    count = 0

    async def scene() -> None:
        nonlocal count
        async with fleet(seed) as sim:

            def seen() -> None:
                nonlocal count
                count += 1

            sim.net.on_event = seen
            await three_requests(sim)

    play(scene())
    return count


async def three_requests(sim: Simulation, hold_s: float = 1.0) -> None:
    for tokens in (30, 47, 64):
        sim.ask(tokens)
    await sim.finish(hold_s=hold_s)


def play_three_requests() -> None:
    """Nothing goes wrong."""

    async def scene() -> None:
        async with fleet() as sim:
            await three_requests(sim)
            assert not any(a.choice.failed_at for a in sim.asked)

    play(scene())


def test_without_a_fault_nothing_is_tried_twice() -> None:
    play_three_requests()


def act_at(number: int, victim: str, act: Callable[[Simulation, str], None], seed: int = 1) -> None:
    """Plays three requests, and acts on a worker at one delivery."""

    async def scene() -> None:
        async with fleet(seed) as sim:
            seen = 0

            def count() -> None:
                nonlocal seen
                seen += 1
                if seen == number:
                    asyncio.get_running_loop().call_soon(act, sim, victim)

            sim.net.on_event = count
            await three_requests(sim, hold_s=20.0)

    play(scene())


@pytest.mark.parametrize("victim", ["p0", "p1", "d0", "d1"])
def test_a_crash_at_any_step_changes_no_token_and_leaks_nothing(victim: str) -> None:
    """Every third delivery of a run; `make model-check` takes them all."""
    for number in range(1, num_events(), 3):
        act_at(number, victim, Simulation.kill)


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seconds", [1.0, 5.0, 60.0])
def test_a_worker_that_freezes_and_comes_back_is_fenced(victim: str, seconds: float) -> None:
    """test_sigstop_prefill_zombie_write_rejected and test_sigstop_decode_zombie_tokens_dropped (F14, F15), simulated."""

    for number in range(1, num_events(), 11):
        act_at(number, victim, freeze_for(seconds))


def freeze_for(seconds: float) -> Callable[[Simulation, str], None]:
    """SIGSTOP, and later SIGCONT."""

    def freeze(sim: Simulation, name: str) -> None:
        address = sim.workers[name].transport.address
        sim.net.freeze(address)
        asyncio.get_running_loop().call_later(seconds, sim.net.thaw, address)
        watch_silence(sim)

    return freeze


def watch_silence(sim: Simulation) -> None:
    """What the router's own timer does: whoever has not reported for long is gone."""
    sim.fleet.drop_silent()
    for worker in sim.workers.values():
        if worker.handle.is_gone.is_set() and not worker.is_dead:
            sim.kill(worker.name)
            sim.net.thaw(worker.transport.address)
    asyncio.get_running_loop().call_later(1.0, watch_silence, sim)


@pytest.mark.parametrize("k", range(1, 9))
def test_kill_prefill_at_block_k(k: int) -> None:
    """F03: partial blocks are dropped, nothing of them is published, another prefill worker does it again."""

    async def scene() -> None:
        async with fleet() as sim:
            at_payload(sim, k, lambda: sim.kill(sender_of(sim).name))
            sim.ask(8 * LAYOUT.block_size)
            await sim.finish()

    play(scene())


def test_kill_prefill_after_data_before_commit() -> None:
    """F04."""

    async def scene() -> None:
        async with fleet() as sim:
            asked = sim.ask(40)

            def all_is_here() -> bool:
                receivings = [r for w in sim.workers.values() for r in w.agent._incoming._receivings.values()]
                return any(r.receiver.num_blocks_received == 5 and r.receiver.state is Recv.GRANTED for r in receivings)

            later = sim.net.later

            def lose_the_commit(source: bytes, target: bytes, act: Callable[[], None], *, in_order: bool) -> None:
                sendings = [s for w in sim.workers.values() for s in w.agent._outgoing._sendings.values()]
                is_commit = in_order and target.startswith(b"d") and any(s.sender.state is Send.COMMITTED for s in sendings)
                if not (is_commit and source.startswith(b"p")):
                    later(source, target, act, in_order=in_order)

            sim.net.later = lose_the_commit  # type: ignore[method-assign]
            await until(all_is_here)
            sim.net.later = later  # type: ignore[method-assign]
            sim.kill(sender_of(sim).name)
            await sim.finish()
            assert asked.choice.timeline.kv_transfer is not None

    play(scene())


def test_kill_prefill_after_commit() -> None:
    """F05: no effect on the stream, not even another attempt."""

    async def scene() -> None:
        async with fleet() as sim:
            asked = sim.ask(40)
            await until(
                lambda: any(
                    w.host.engine.load().running for w in sim.workers.values() if w.name[0] == "d" and not len(w.agent._incoming)
                )
            )
            for name in ("p0", "p1"):
                sim.kill(name)
            await sim.finish()
            assert not asked.choice.failed_at

    play(scene())


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_kill_decode_mid_stream(tokens: int) -> None:
    """F08: contiguous and identical, on the other decode worker."""

    async def scene() -> None:
        async with fleet() as sim:
            asked = sim.ask(40, 6)
            await until(lambda: len(asked.choice.ids) >= tokens)
            for worker in [w for w in sim.workers.values() if w.name[0] == "d" and w.handle.attempts]:
                sim.kill(worker.name)
            await sim.finish()

    play(scene())


def test_kill_decode_before_terminal() -> None:
    """F09: every token was streamed, the end was not: the router knows what it is."""

    async def scene() -> None:
        async with fleet() as sim:
            asked = sim.ask(40, 6)
            sim.net.is_cut = lambda source, target: target == b"router" and source.startswith(b"d") and len(asked.choice.ids) == 6
            await until(lambda: len(asked.choice.ids) == 6)
            for worker in [w for w in sim.workers.values() if w.name[0] == "d" and w.handle.attempts]:
                sim.kill(worker.name)
            await sim.finish()
            assert asked.choice.finish_reason

    play(scene())


def test_kill_decode_while_queued_redirects_what_is_computed() -> None:
    """F06: nothing is computed again."""

    async def scene() -> None:
        async with fleet(prefill=1) as sim:
            asked = sim.ask(64)
            engine = sim.workers["p0"].host.engine
            await until(lambda: asked.choice.ids)  # the prompt is computed
            computed = engine._sequences._arrivals
            sim.kill(receiver_of(sim).name)
            await sim.finish(hold_s=20.0)
            assert engine._sequences._arrivals == computed, "the prompt was computed again"

    play(scene())


def test_a_decode_worker_without_room_passes_the_prompt_on() -> None:
    """Waits, then redirects; the prompt is not computed again, and the client waits no longer than that."""

    async def scene() -> None:
        plans = [WorkerPlan("decode", num_blocks=12), WorkerPlan("decode", num_blocks=40)]
        async with fleet(prefill=1, decode=plans) as sim:
            full, engine = sim.workers["d0"], sim.workers["p0"].host.engine
            hog = full.host.engine.blocks.allocate(12)
            assert hog is not None
            full.handle.load.free_blocks = 12  # what the router believes
            full._reporter.cancel()
            asked = [sim.ask(40) for _ in range(4)]
            await until(lambda: all(a.task.done() for a in asked))
            full.host.engine.blocks.release(hog)
            await sim.finish()
            assert engine._sequences._arrivals == 4

    play(scene())


def test_partition_p_d_pair_avoided() -> None:
    """F31: both live, their link does not: the pair is left alone for a while, no worker is."""

    async def scene() -> None:
        async with fleet() as sim:
            cut = {sim.workers["p0"].transport.address, sim.workers["d0"].transport.address}
            sim.net.is_cut = lambda source, target: {source, target} == cut
            p0, d0 = (sim.workers[name].incarnation for name in ("p0", "d0"))

            def bad_peers() -> frozenset[bytes]:
                return next(v.bad_peers for v in sim.fleet.scan().workers if v.incarnation == p0)

            while not bad_peers():
                sim.ask(40)
                await until(lambda: sim.asked[-1].task.done())
                assert len(sim.asked) < 50
            assert bad_peers() == {d0}
            assert all(v.can_take and not v.is_suspect for v in sim.fleet.scan().workers)
            later = [sim.ask(40) for _ in range(10)]
            await until(lambda: all(a.task.done() for a in later))
            assert not any(a.choice.failed_at for a in later)
            await sim.finish(hold_s=20.0)

    play(scene())


@pytest.mark.parametrize("direction", ["to prefill", "to decode"])
def test_asymmetric_ack_loss_no_wedge(direction: str) -> None:
    """F34: one way only, from the middle of a transfer on."""

    async def scene() -> None:
        async with fleet() as sim:
            first, second = (b"d", b"p") if direction == "to prefill" else (b"p", b"d")
            pair: list[tuple[bytes, bytes]] = []

            def cut() -> None:
                ends = sender_of(sim).transport.address, receiver_of(sim).transport.address
                pair.append(ends if first == b"p" else (ends[1], ends[0]))

            at_payload(sim, 2, cut)
            sim.net.is_cut = lambda source, target: (source, target) in pair
            sim.ask(64)
            await sim.finish(hold_s=20.0)
            assert pair and pair[0][0].startswith(first) and pair[0][1].startswith(second)

    play(scene())


def flip(message: memoryview, at: int) -> None:
    message[at] ^= 0x20


PLACES = {
    "magic": 1, "version": 4, "kind": 5, "flags": 6, "length": 9, "incarnation": 13, "fingerprint": 41, "transfer id": 50,
    "slot": 65, "generation": 69, "dtype": 73, "algorithm": 74, "layers": 78, "heads": 82, "blocks": 84, "tokens": 92,
    "sizes": 97, "digest": 109, "first byte": 128, "last byte": -1,
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_kv_bitflip_detected(place: str) -> None:
    """F37: recomputed once, never wrong; both workers go on."""

    async def scene() -> None:
        async with fleet() as sim:
            seen = 0

            def damage(message: memoryview) -> None:
                nonlocal seen
                seen += 1
                if seen == 2:
                    flip(message, PLACES[place])

            sim.net.damage = damage
            asked = sim.ask(40)
            await sim.finish(hold_s=20.0)
            assert seen > 3, "it was sent again"
            assert asked.choice.failed_at

    play(scene())


def test_a_corrupt_block_is_never_shared() -> None:
    """F37, K11: the request is tried again on the same two workers, and must not find in decode's cache what failed."""

    async def scene() -> None:
        async with fleet(prefill=1, decode=1) as sim:
            seen = 0

            def damage(message: memoryview) -> None:
                nonlocal seen
                seen += 1
                if seen == 2:
                    flip(message, -1)

            sim.net.damage = damage
            sim.ask(60)
            await sim.finish(hold_s=20.0)
            assert seen > 4

    play(scene())


@pytest.mark.parametrize("what", ["swapped", "stale", "of another slot"])
def test_kv_swap_and_stale_detected(what: str) -> None:
    """F38: bytes that are whole, of the right size, and of another block, another time or another slot."""

    async def scene() -> None:
        async with fleet() as sim:
            last: list[bytes] = []
            has_hit = False

            def damage(message: memoryview) -> None:
                nonlocal has_hit
                frame = parse_frame(message)
                if frame.kind != PAYLOAD:
                    return
                payload = parse_payload(frame.body)
                if last and not has_hit and len(last[-1]) == len(message):
                    has_hit = True
                    if what == "swapped" and payload.header.num_blocks == 2:
                        size = payload.header.block_bytes
                        first, second = bytes(payload.blocks[:size]), bytes(payload.blocks[size : 2 * size])
                        payload.blocks[:size], payload.blocks[size : 2 * size] = second, first
                    elif what == "stale":
                        begin = len(message) - len(payload.blocks)
                        message[begin:] = last[-1][begin:]
                    else:
                        message[:] = last[-1]
                last.append(bytes(message))

            sim.net.damage = damage
            sim.ask(64)
            await sim.finish(hold_s=20.0)
            assert has_hit

    play(scene())


def test_kv_replay_ignored() -> None:
    """F39: every control frame arrives twice, and again much later."""

    async def scene() -> None:
        async with fleet() as sim:
            for worker in sim.workers.values():
                deliver = worker.transport.on_control
                assert deliver is not None

                def twice(data: memoryview, deliver: Callable[[memoryview], None] = deliver) -> None:
                    copy = memoryview(bytes(data))
                    deliver(data)
                    deliver(copy)
                    asyncio.get_running_loop().call_later(0.05, deliver, copy)

                worker.transport.on_control = twice
            await three_requests(sim)
            assert all(w.agent.dropped["repeated"] for w in sim.workers.values() if w.agent.dropped)
            assert not any(a.choice.failed_at for a in sim.asked)

    play(scene())


def test_notify_before_data() -> None:
    """F41: payloads take a hundred times as long as the commit; nothing joins before all of it was verified."""

    async def scene() -> None:
        async with fleet() as sim:
            later = sim.net.later

            def slow(source: bytes, target: bytes, act: Callable[[], None], *, in_order: bool) -> None:
                if in_order or not target.startswith(b"d"):
                    later(source, target, act, in_order=in_order)
                else:
                    asyncio.get_running_loop().call_later(0.1, lambda: later(source, target, act, in_order=False))

            sim.net.later = slow  # type: ignore[method-assign]
            await three_requests(sim)
            assert not any(a.choice.failed_at for a in sim.asked)

    play(scene())


@pytest.mark.parametrize("number", range(1, 60, 4))
def test_abort_then_reuse_no_overlap(number: int) -> None:
    """F42: a request is cancelled in mid transfer while others wait for its blocks; what arrives late hits nobody."""

    async def scene() -> None:
        async with fleet(prefill=1, decode=[WorkerPlan("decode", num_blocks=12)]) as sim:
            sim.net.delay_s = 0.02
            asked = [sim.ask(64), *(sim.ask(40) for _ in range(3))]
            seen = 0

            def cancel() -> None:
                nonlocal seen
                seen += 1
                if seen == number:
                    asyncio.get_running_loop().call_soon(asked[0].task.cancel)

            sim.net.on_event = cancel
            await sim.finish(hold_s=2.0)

    play(scene())


def test_long_step_keeps_control_alive() -> None:
    """F44: steps longer than every control deadline; nothing is declared dead and nothing is computed twice."""

    async def scene() -> None:
        plan = WorkerPlan("prefill", step_s=70.0)
        async with fleet(prefill=[plan], decode=[WorkerPlan("decode", step_s=70.0)]) as sim:
            sim.ask(48, 3, deadline_s=3000.0)
            await sim.finish()
            assert sim.workers["p0"].host.engine._sequences._arrivals == 1
            assert not sim.asked[0].choice.failed_at

    play(scene())


def test_transport_every_16th_fails() -> None:
    """F77."""

    async def scene() -> None:
        async with fleet() as sim:
            count = 0

            def fails() -> bool:
                nonlocal count
                count += 1
                return count % 16 == 0

            sim.net.fails = fails
            for _ in range(10):
                sim.ask(120)
            await sim.finish(hold_s=20.0)
            assert count > 50

    play(scene())


def test_cancel_mid_exchange_no_crosstalk() -> None:
    """F79: half of the requests are cancelled at once in the middle of their transfers; the others never notice."""

    async def scene() -> None:
        async with fleet() as sim:
            sim.net.delay_s = 0.02
            asked = [sim.ask(40 + i) for i in range(8)]
            await until(lambda: any(len(w.agent._incoming) for w in sim.workers.values()))
            await asyncio.sleep(0.03)
            for each in asked[::2]:
                each.task.cancel()
            await sim.finish(hold_s=2.0)

    play(scene())


def test_preempt_migrate_identity() -> None:
    """F80: a sequence is preempted, its worker dies, it goes on where its prefix is cached: the same tokens."""

    async def scene() -> None:
        async with fleet(decode=[WorkerPlan("decode", num_blocks=14), WorkerPlan("decode", num_blocks=64)]) as sim:
            for _ in range(2):
                sim.ask(40, 40, seed=5)  # the same prompt everywhere
                sim.ask(40, 40, seed=6)
            small = sim.workers["d0"]
            await until(lambda: small.host.engine._scheduler.num_preemptions)
            assert not any(asked.task.done() for asked in sim.asked)
            sim.kill("d0")
            await sim.finish(hold_s=20.0)

    play(scene())


def test_deadline_at_every_stage() -> None:
    """F52: wherever a request is when its time is up, it ends with the tokens it had, and one step later nothing is computed for
    it. (In the router's queue: tests/router/test_flow.py.)"""

    async def scene(stages: set[str], deadline_s: float) -> None:
        async with fleet(prefill=1, decode=1) as sim:
            num_rows = 0

            def counted(step: Callable[[], StepResult]) -> StepResult:
                nonlocal num_rows
                result = step()
                num_rows += result.num_rows
                return result

            for worker in sim.workers.values():
                worker.host.engine.step = partial(counted, worker.host.engine.step)  # type: ignore[method-assign]
            asked = sim.ask(100, 300, deadline_s=deadline_s)
            await asyncio.wait([asked.task])
            p, d = sim.workers["p0"], sim.workers["d0"]
            if p.host.engine.has_work:
                stages.add("prefill")
            elif d.host.engine.has_work:
                stages.add("decode")
            elif p.agent.num_open:
                stages.add("transfer")
            await asyncio.sleep(0.1)  # the cancel is on its way, a step is under way
            before = num_rows
            await sim.finish(may_fail=True)
            await asyncio.sleep(2.0)
            assert num_rows == before
            assert asked.error is not None and asked.error.code is Code.DEADLINE_EXCEEDED
            assert f"after {len(asked.choice.ids)} tokens" in str(asked.error)

    stages: set[str] = set()
    for number in range(60):
        play(scene(stages, 0.001 + number * 0.004))
    assert stages == {"prefill", "transfer", "decode"}


def test_double_abort_single_terminal() -> None:
    """F81: the client and a deadline at the same moment."""

    async def scene() -> None:
        async with fleet() as sim:
            sim.net.delay_s = 0.02
            asked = sim.ask(64)
            await until(lambda: any(len(w.agent._incoming) for w in sim.workers.values()))
            await until(lambda: any(len(w.agent._outgoing) for w in sim.workers.values()))
            [sending] = sender_of(sim).agent._outgoing._sendings.values()
            [receiving] = receiver_of(sim).agent._incoming._receivings.values()
            asked.task.cancel()
            sending.sender.abort("deadline")
            receiving.receiver.close("deadline", is_retryable=True)
            assert sending.sender.state is Send.ABORTED
            await sim.finish(hold_s=2.0)

    play(scene())


def test_slow_kv_link_is_slow_and_right() -> None:
    """F36, simulated: a payload takes a second; deadlines go by progress, so the transfer is slow and arrives."""

    async def scene() -> None:
        async with fleet(prefill=1, decode=1) as sim:
            sim.net.delay_s = 1.0
            began = time.monotonic()
            asked = sim.ask(8 * 8 * LAYOUT.block_size // 8, deadline_s=300.0)
            await sim.finish(hold_s=20.0)
            assert time.monotonic() - began > limits.PROGRESS_S
            assert not asked.choice.failed_at

    play(scene())


@pytest.mark.parametrize("in_place", [True], indirect=True)  # 10 s, and one way is as good as the other
def test_short_prompts_beside_one_of_100000_tokens_are_not_starved() -> None:
    """It needs most of decode's pool and 6250 ring slots; short ones come all the time. Nobody waits for the other's end."""

    async def scene() -> None:
        prefill = WorkerPlan("prefill", num_blocks=26_000, chunk_tokens=2048, step_s=0.02)
        decode = WorkerPlan("decode", num_blocks=13_000, max_running=64)
        async with fleet(prefill=[prefill, prefill], decode=[decode]) as sim:
            long = sim.ask(100_000, 3, deadline_s=600.0)
            for _ in range(40):
                sim.ask(24, 5, deadline_s=600.0)
                await asyncio.sleep(0.05)
            short = sim.asked[1:]
            await until(lambda: all(a.task.done() for a in short), 10.0)
            assert not long.task.done()
            await until(long.task.done, 60.0)
            await sim.finish()
            assert not any(a.choice.failed_at for a in sim.asked)

    play(scene())


def test_a_long_prompt_gets_its_turn_among_short_ones_that_always_fit() -> None:
    """Decode is nearly full of short sequences, and more come than end: after a second nobody overtakes any more."""

    async def scene() -> None:
        plans = [WorkerPlan("prefill", num_blocks=400, chunk_tokens=64)] * 2, [WorkerPlan("decode", num_blocks=60, max_running=16)]
        async with fleet(prefill=plans[0], decode=plans[1]) as sim:
            for i in range(150):
                sim.ask(24, 30, deadline_s=600.0)
                if i == 20:
                    long = sim.ask(400, 3, deadline_s=600.0)
                await asyncio.sleep(0.02)
            await until(long.task.done, 10.0)
            assert not all(a.task.done() for a in sim.asked), "it did not have to wait for all of them"
            await sim.finish()

    play(scene())


def test_decode_short_of_blocks_revokes_and_nothing_is_computed_again() -> None:
    """What runs grows into the blocks of a transfer that has only begun: those are given back, and sent again later."""

    async def scene() -> None:
        slow = WorkerPlan("prefill", num_blocks=400, chunk_tokens=16, step_s=0.2)
        async with fleet(prefill=[WorkerPlan("prefill"), slow], decode=[WorkerPlan("decode", num_blocks=32)]) as sim:
            engine = sim.workers["d0"].host.engine
            sim.fleet.strike(sim.workers["p1"].incarnation, "test")  # the first three go through the fast one
            for _ in range(3):
                sim.ask(24, 40, deadline_s=600.0)
            await until(lambda: len(engine._scheduler.running) == 3)
            sim.fleet.worker(sim.workers["p1"].incarnation).suspect_until = 0.0  # type: ignore[union-attr]
            sim.fleet.strike(sim.workers["p0"].incarnation, "test")
            late = sim.ask(128, 3, deadline_s=600.0)
            revoked = False

            def is_revoked() -> bool:
                nonlocal revoked
                revoked |= any(r.receiver.num_revoked for r in sim.workers["d0"].agent._incoming._receivings.values())
                return revoked or late.task.done()

            await until(is_revoked)
            await sim.finish()
            assert revoked and engine._scheduler.num_preemptions == 0
            assert sim.workers["p1"].host.engine._sequences._arrivals == 1
            assert not late.choice.failed_at

    play(scene())
