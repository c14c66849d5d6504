"""Steps in closed form, beside the same steps one by one."""

from __future__ import annotations

import pytest

from router.costs import PromptCost
from router.simulation.engine import Engine, StepCost
from router.simulation.lane import Job, Lane
from router.simulation.timeline import Timeline
from splitfire.core.workload_trace import Arrival

ENGINE = Engine(PromptCost(0.001, 1e-4, 1e-7), StepCost(0.002, 1e-4, 1e-6), 1000, 16, chunk_tokens=64)


class Desk:
    """One lane; prompts always have room, and decode where they were computed."""

    def __init__(self, engine: Engine = ENGINE) -> None:
        self.timeline = Timeline()
        self.lane = Lane(self.timeline, engine, self._admit, self._computed, self._ended)
        self.jobs: list[Job] = []

    def ask(self, at: float, num_tokens: int, num_output: int, key: float = 0.0) -> Job:
        job = Job(len(self.jobs), Arrival(at, num_tokens, num_output, ()), key=key)
        self.jobs.append(job)
        self.timeline.at(at, lambda: self.lane.compute(job))
        return job

    def _admit(self, job: Job) -> bool:
        job.started_s = self.timeline.now
        return True

    def _computed(self, job: Job) -> None:
        job.first_s = self.timeline.now
        if job.arrival.num_output > 1:
            self.lane.decode(job)

    def _ended(self, job: Job) -> None:
        job.ended_s = self.timeline.now


def test_a_prompt_alone_takes_what_its_cost_says() -> None:
    desk = Desk()
    job = desk.ask(0.5, 1000, 1)
    desk.timeline.run()
    assert job.first_s == pytest.approx(0.5 + ENGINE.prompt.seconds(1000))


def step_by_step(asks: list[tuple[float, int, int]]) -> list[tuple[float, float]]:
    """First and last token of each, in a loop that makes one step after the other."""
    now, prompts, running = 0.0, list(range(len(asks))), dict[int, int]()
    computed = [0] * len(asks)
    firsts, lasts = [0.0] * len(asks), [0.0] * len(asks)
    while prompts or running:
        here = [i for i in prompts if asks[i][0] <= now]
        if not here and not running:
            now = asks[prompts[0]][0]
            continue
        took = 0.0
        if running:
            context = sum(asks[i][1] + done for i, done in running.items())
            took += ENGINE.step.seconds(len(running), context)
        size = 0
        if here:
            i = here[0]
            size = min(ENGINE.chunk_tokens - len(running), asks[i][1] - computed[i])
            took += size * (ENGINE.prompt.token_s + (computed[i] + size / 2) * ENGINE.prompt.pair_s)
            computed[i] += size
            took += ENGINE.prompt.base_s if computed[i] == asks[i][1] else 0.0
        now += took
        for i in list(running):
            running[i] += 1
            if running[i] == asks[i][2]:
                lasts[i] = now
                del running[i]
        if here and computed[here[0]] == asks[here[0]][1]:
            i = here[0]
            prompts.remove(i)
            firsts[i] = lasts[i] = now
            if asks[i][2] > 1:
                running[i] = 1
    return list(zip(firsts, lasts, strict=True))


def test_many_steps_at_once_end_when_they_do_one_by_one() -> None:
    asks = [(0.0, 200, 30), (0.001, 40, 5), (0.02, 300, 50), (0.021, 64, 1), (0.3, 500, 4), (2.0, 10, 3)]
    desk = Desk()
    jobs = [desk.ask(*ask) for ask in asks]
    desk.timeline.run()
    for job, (first, last) in zip(jobs, step_by_step(asks), strict=True):
        assert job.first_s == pytest.approx(first, abs=1e-9)
        assert (job.ended_s or job.first_s) == pytest.approx(last, abs=1e-9)


def test_a_short_prompt_passes_a_long_one_at_the_end_of_a_chunk() -> None:
    desk = Desk()
    long, short = desk.ask(0.0, 6400, 1, key=6400.0), desk.ask(0.01, 32, 1, key=96.0)
    desk.timeline.run()
    assert short.first_s is not None and long.first_s is not None
    assert short.first_s < 0.01 + 2 * ENGINE.prompt.seconds(64) + ENGINE.prompt.seconds(32)
    assert long.first_s == pytest.approx(ENGINE.prompt.seconds(6400) + ENGINE.prompt.seconds(32))
