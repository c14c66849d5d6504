"""Exhaustive breadth-first search over the worlds of a scenario. A world is made again from its path; its key tells whether
it was seen. The first violation found is therefore on a shortest path, which is the message.

    python -m tests.model.explore            every scenario of SCENARIOS, minutes
    python -m tests.model.explore revoke     one of them
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.agent import TransferAgent
from tests.model.world import Event, Scenario, Violation, World

# Together: two requests, two and three slots, abort anywhere, crash and restart, revoke, loss, repetition, deadlines.
SCENARIOS = {
    "one": Scenario(requests=1, blocks=2, chunks=2, aborts=1),
    "revoke": Scenario(requests=1, blocks=2, chunks=2, revokes=1, aborts=1),
    "crash": Scenario(requests=1, blocks=2, crashes=1, aborts=1),
    "deadline": Scenario(requests=1, blocks=2, jumps=1, aborts=1),
    "lossy": Scenario(requests=1, blocks=2, losses=1, jumps=1),
    "repeated": Scenario(requests=1, blocks=2, repeats=1),
    "two": Scenario(requests=2, blocks=1, aborts=1),
    "one slot for two": Scenario(requests=2, blocks=1, slots=1, aborts=1),
    "two short of blocks": Scenario(requests=2, blocks=1, pool=1, revokes=1),
    "crash beside another": Scenario(requests=1, blocks=1, crashes=1, late=1),
    "two pieces": Scenario(requests=2, blocks=2, slots=2),
    "three slots": Scenario(requests=2, blocks=2, slots=3, pool=2),
    "two revoked": Scenario(requests=2, blocks=1, revokes=1),
    "in place": Scenario(requests=1, blocks=2, chunks=2, revokes=1, aborts=1, in_place=True),
    "in place one slot": Scenario(requests=2, blocks=1, slots=1, aborts=1, in_place=True),
    "in place crash": Scenario(requests=1, blocks=2, crashes=1, aborts=1, in_place=True),
}


@dataclass(frozen=True)
class Found:
    """What a search saw."""

    num_worlds: int
    num_steps: int
    num_quiet: int
    seconds: float


class Counterexample(AssertionError):
    """A path that breaks a promise."""

    def __init__(self, path: tuple[Event, ...], violation: BaseException) -> None:
        steps = " ".join(f"{e.kind}:{e.at}" for e in path)
        super().__init__(f"{violation} ({type(violation).__name__}) after {steps}")
        self.violation = violation


def replay(scenario: Scenario, path: tuple[Event, ...], make_agent: Callable[..., TransferAgent]) -> World:
    world = World(scenario, make_agent)
    for event in path:
        world.apply(event)
    return world


def explore(scenario: Scenario, make_agent: Callable[..., TransferAgent] = TransferAgent, max_worlds: int | None = None) -> Found:
    """Visits every world once; Counterexample on the first that breaks a promise. `max_worlds` ends it early, for smoke tests."""
    began = time.monotonic()
    seen = {World(scenario, make_agent).key()}
    frontier: deque[tuple[Event, ...]] = deque([()])
    num_steps = num_quiet = 0
    while frontier:
        path = frontier.popleft()
        world: World | None = replay(scenario, path, make_agent)
        assert world is not None
        steps, faults = list(world.enabled()), list(world.faults())
        for event in (*steps, *faults):
            num_steps += 1
            following = (*path, event)
            try:
                if world is None:
                    world = replay(scenario, path, make_agent)
                world.apply(event)
                key = world.key()
            except (Exception, Violation) as exc:
                raise Counterexample(following, exc) from exc
            world = None  # the next one is made again
            if key not in seen:
                seen.add(key)
                frontier.append(following)
        if not steps:
            num_quiet += 1
            _settle(scenario, path, make_agent)
        if max_worlds is not None and len(seen) >= max_worlds:
            break
    return Found(len(seen), num_steps, num_quiet, time.monotonic() - began)


def _settle(scenario: Scenario, path: tuple[Event, ...], make_agent: Callable[..., TransferAgent]) -> None:
    try:
        replay(scenario, path, make_agent).settle()
    except (Exception, Violation) as exc:
        raise Counterexample((*path, Event("settle")), exc) from exc


def main(names: list[str]) -> int:
    for name in names or list(SCENARIOS):
        try:
            found = explore(SCENARIOS[name])
        except Counterexample as exc:
            print(f"{name}: {exc}")
            return 1
        print(f"{name:22} {found.num_worlds:8} worlds {found.num_steps:8} steps {found.num_quiet:6} ends  {found.seconds:6.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
