"""A fleet and its misfortunes, all drawn from one seed: requests that share prefixes, and workers killed, frozen and cut off, KV damaged,
sends that fail, cache events that get lost, clients that leave or have no time.

python -m tests.faults.sim.campaign SEED plays one of them again and says what happened.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from splitfire.core.errors import Code, SplitfireError
from tests.model.clock import play
from tests.model.simulator import Asked, Simulation, WorkerPlan

# What a request may end in when its fleet falls apart. Anything else is a bug.
HONEST = {
    (Code.UNAVAILABLE, None),
    (Code.DEADLINE_EXCEEDED, None),
    (Code.RESOURCE_EXHAUSTED, "queue_full"),
    (Code.ABORTED, "preempted"),
    (Code.DATA_LOSS, "kv_digest_mismatch"),
    (Code.INTERNAL, "request_suspected_poison"),
}
SECONDS = 4.0  # of arrivals and faults
LATE_S = 1.0  # after its deadline a request has ended (P7)
HELD_S = 20.0  # nothing is held longer when peers died (P5)


@dataclass
class Campaign:
    """One seed's play. `events` says what was done, when."""

    seed: int
    events: list[str] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)  # when, by the request's number

    async def run(self) -> Simulation:
        random = Random(self.seed)
        sim = Simulation(self.seed, split=random.choice(["always", "auto", "auto", "never"]), in_place=random.random() < 0.5)
        prefill, decode = ([self._plan(random, role) for _ in range(random.randint(1, 3))] for role in ("prefill", "decode"))
        sim.start(prefill, decode)
        self._note(f"{len(prefill)} prefill, {len(decode)} decode, split {sim.split}, in place {sim.in_place}")
        self._spoil(sim, random)
        await asyncio.gather(self._ask(sim, random), *(self._harm(sim, random) for _ in range(random.randint(0, 5))))
        sim.net.is_cut = lambda source, target: False
        sim.net.damage = lambda message: None
        sim.net.fails = sim.net.loses_report = lambda: False
        for address in list(sim.net.frozen):
            sim.net.thaw(address)
        await sim.finish(may_fail=True, hold_s=HELD_S)
        self._check(sim)
        await self._check_index(sim)
        sim.close()
        return sim

    # -- what is done

    def _plan(self, random: Random, role: str) -> WorkerPlan:
        return WorkerPlan(
            role, num_blocks=random.choice([24, 64, 200]), chunk_tokens=random.choice([16, 64]), step_s=random.choice([0.002, 0.02])
        )

    async def _ask(self, sim: Simulation, random: Random) -> None:
        for number in range(random.randint(5, 25)):
            await asyncio.sleep(random.uniform(0, 2 * SECONDS / 25))
            deadline_s = random.choice([0.3, 5.0, 60.0, 60.0])
            # Few seeds of prompts: those that share one begin alike.
            asked = sim.ask(
                random.randint(1, 120),
                random.randint(1, 40),
                seed=random.randrange(4),
                deadline_s=deadline_s,
                priority=random.randint(1, 3),
            )
            self._note(f"r{number}: {len(asked.prompt)} + {asked.count} tokens in {deadline_s:g} s")
            asked.task.add_done_callback(partial(self._has_ended, number))
            if random.random() < 0.15:
                asyncio.get_running_loop().call_later(random.uniform(0, 0.5), asked.task.cancel)

    async def _harm(self, sim: Simulation, random: Random) -> None:
        await asyncio.sleep(random.uniform(0, SECONDS))
        name = random.choice(sorted(sim.workers))
        worker = sim.workers[name]
        what = random.choice(["kill", "kill", "freeze", "cut"])
        self._note(f"{what} {name}")
        if what == "kill":
            sim.kill(name, restart_s=random.choice([0.2, 1.0, 3.0]))
        elif what == "freeze":
            sim.net.freeze(worker.transport.address)
            await asyncio.sleep(random.choice([0.5, 4.0, 12.0]))
            sim.net.thaw(worker.transport.address)
        else:
            address = worker.transport.address
            sim.net.is_cut = lambda source, target: address in (source, target) and b"router" not in (source, target)
            await asyncio.sleep(random.uniform(0.1, 3.0))
            sim.net.is_cut = lambda source, target: False

    def _spoil(self, sim: Simulation, random: Random) -> None:
        """Faults that come now and then, all the time."""
        draw = Random(self.seed + 1)
        if random.random() < 0.3:
            self._note("one payload in ten is damaged")

            def damage(message: memoryview) -> None:
                if len(message) and draw.random() < 0.1:
                    message[draw.randrange(len(message))] ^= 1 << draw.randrange(8)

            sim.net.damage = damage
        if random.random() < 0.3:
            self._note("one send in sixteen fails")
            sim.net.fails = lambda: draw.random() < 1 / 16
        if random.random() < 0.5:
            self._note("one cache event in three is lost")
            sim.net.loses_report = lambda: draw.random() < 1 / 3
        sim.net.delay_s = random.choice([0.0002, 0.001, 0.05])

    # -- what must hold

    def _check(self, sim: Simulation) -> None:
        """Tokens were compared by `finish`: here is how, and when, requests may end."""
        for number, asked in enumerate(sim.asked):
            late_s = self.ended[number] - asked.choice.plan.deadline
            assert late_s <= LATE_S, f"r{number} ended {late_s:.1f} s after its deadline"
            assert asked.error is None or is_honest(asked.error), f"r{number}: {asked.error!r} ({asked.error.reason})"
        assert sim.admission.num_running == sim.admission.num_queued == 0

    async def _check_index(self, sim: Simulation) -> None:
        """Told everything once more, for the last event may have been lost, the router knows exactly what each pool holds."""
        await asyncio.sleep(40.0)  # credits without an event expire
        for worker in sim.workers.values():
            worker.feed.resync()
        await asyncio.sleep(2.0)
        sim.fleet.depths([0])  # whoever asks first lets them
        for worker in sim.workers.values():
            known = sim.fleet._index.num_blocks(worker.incarnation)
            assert known == worker.host.engine.blocks.num_indexed, f"{worker.name}: {known} blocks are known"

    def _has_ended(self, number: int, _task: object) -> None:
        self.ended[number] = time.monotonic()

    def _note(self, what: str) -> None:
        self.events.append(f"{time.monotonic() - 1000.0:8.3f}  {what}")


def is_honest(error: SplitfireError) -> bool:
    return (error.code, None) in HONEST or (error.code, error.reason) in HONEST


def replay(seed: int, say: Callable[[str], None] = lambda line: None) -> list[Asked]:
    """One seed; AssertionError says what did not hold, and how to see it again."""
    campaign, asked = Campaign(seed), []

    async def scene() -> None:
        sim = await campaign.run()
        asked.extend(sim.asked)

    try:
        play(scene())
    except BaseException as exc:
        for line in campaign.events:
            say(line)
        raise AssertionError(f"seed {seed}: {exc}; again: python -m tests.faults.sim.campaign {seed}") from exc
    for line in campaign.events:
        say(line)
    return asked


def main(seed: int) -> None:
    say = partial(print, file=sys.stdout)
    for one in replay(seed, say):
        outcome = one.error.reason if one.error is not None else "cancelled" if one.task.cancelled() else "complete"
        say(f"{one.choice.plan.request_id}: {len(one.choice.ids)} tokens, {outcome}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
