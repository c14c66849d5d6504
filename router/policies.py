"""Ways to choose a worker that know nothing of prompts or caches: what placement by cost is compared with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from router.views import WorkerView

PolicyName = Literal["cost", "round_robin", "least_loaded", "power_of_two", "random"]
Policy = Callable[[Sequence[WorkerView], Random], bytes]


class RoundRobin:
    """Each in turn, of each role."""

    def __init__(self) -> None:
        self._last: dict[bool, bytes] = {}

    def __call__(self, workers: Sequence[WorkerView], random: Random) -> bytes:
        names = sorted(worker.incarnation for worker in workers)
        is_prefill = workers[0].is_prefill
        last = self._last.get(is_prefill, b"")
        taken = next((name for name in names if name > last), names[0])
        self._last[is_prefill] = taken
        return taken


def least_loaded(workers: Sequence[WorkerView], random: Random) -> bytes:
    """By what runs there; ties at random."""
    least = min(worker.num_running for worker in workers)
    return random.choice([worker for worker in workers if worker.num_running == least]).incarnation


def power_of_two(workers: Sequence[WorkerView], random: Random) -> bytes:
    """The less loaded of two that are drawn (Mitzenmacher 2001)."""
    return least_loaded(random.sample(list(workers), min(2, len(workers))), random)


def at_random(workers: Sequence[WorkerView], random: Random) -> bytes:
    return random.choice(workers).incarnation


def make_policy(name: PolicyName) -> Policy | None:
    """None: by cost."""
    others: dict[str, Policy] = {
        "round_robin": RoundRobin(),
        "least_loaded": least_loaded,
        "power_of_two": power_of_two,
        "random": at_random,
    }
    return others.get(name)
