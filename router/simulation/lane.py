"""The steps of one engine, many at once: between two moments when something joins or ends, steps grow evenly, so their sum is known. Pure.

A step decodes one token of each sequence and computes one chunk of one prompt, the one with the least key; another one with a lesser key
takes its turn at the next step. Whoever joins does so at the next step too.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from router.simulation.engine import Engine
from router.simulation.pool import Lease
from router.simulation.timeline import Timeline
from router.views import Placement
from splitfire.core.workload_trace import Arrival


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way. Times are None until they are known."""

    number: int
    arrival: Arrival
    placement: Placement | None = None
    key: float = 0.0  # of its prompt's turn
    num_cached: int = 0  # where it is computed
    num_computed: int = 0
    leases: dict[bytes, Lease] = field(default_factory=dict)
    dispatched_s: float = 0.0
    started_s: float | None = None
    computed_s: float = 0.0  # seconds of steps that its prompt took
    first_s: float | None = None
    granted_s: float | None = None  # room at decode, of a hand-off
    ended_s: float | None = None

    @property
    def num_left(self) -> int:
        return self.arrival.num_tokens - self.num_computed

    def __lt__(self, other: Job) -> bool:
        return (self.key, self.number) < (other.key, other.number)


@dataclass(eq=False, slots=True)
class _Run:
    """`count` steps from `began` on: the first takes `first_s`, each further one `more_s` longer."""

    began: float
    count: int
    first_s: float
    more_s: float
    prompt: Job | None
    size: int  # tokens of the prompt in each

    def seconds(self, count: int) -> float:
        return count * self.first_s + self.more_s * count * (count - 1) / 2

    def steps_by(self, elapsed: float) -> int:
        """How many have ended when the step that runs then has."""
        a, b = self.more_s / 2, self.first_s - self.more_s / 2
        count = (math.sqrt(b * b + 4 * a * elapsed) - b) / (2 * a) if a > 0 else elapsed / b if b > 0 else math.inf
        return min(self.count, max(1, math.ceil(count - 1e-9)))


class Lane:
    """Prompts wait here in order of their keys, and start when `admit` finds room for them."""

    def __init__(
        self,
        timeline: Timeline,
        engine: Engine,
        admit: Callable[[Job], bool],
        on_computed: Callable[[Job], None],
        on_ended: Callable[[Job], None],
    ) -> None:
        self._timeline = timeline
        self._engine = engine
        self._admit = admit
        self._on_computed = on_computed
        self._on_ended = on_ended
        self._prompts: list[Job] = []
        self._ends: list[tuple[int, int, Job]] = []  # heap: the step that is each sequence's last
        self._num_steps = 0
        self._context = 0  # tokens of all sequences
        self._run: _Run | None = None
        self._is_between = False  # steps: what comes is seen by the next one
        self._joining: list[Job] = []
        self.gaps: list[tuple[float, int]] = []  # seconds between two tokens, and how many such there were
        self.busy: list[tuple[float, float]] = []  # from, to

    @property
    def num_decoding(self) -> int:
        return len(self._ends) + len(self._joining)

    @property
    def step_s(self) -> float:
        """Of one that only decodes what is here now; 0 when nothing is."""
        return self._engine.step.seconds(len(self._ends), self._context) if self._ends else 0.0

    def compute(self, job: Job) -> None:
        insort(self._prompts, job)
        self._interrupt()

    def decode(self, job: Job) -> None:
        self._joining.append(job)
        self._interrupt()

    def look(self) -> None:
        """There may be room for a prompt now."""
        if self._run is None or self._run.prompt is None:
            self._interrupt()

    def _interrupt(self) -> None:
        """The step that runs is the last of its run."""
        if self._is_between:
            return
        run = self._run
        if run is None:
            self._plan()
            return
        count = run.steps_by(self._timeline.now - run.began)
        if count < run.count:
            run.count = count
            self._expect(run)

    def _expect(self, run: _Run) -> None:
        count = run.count
        self._timeline.at(run.began + run.seconds(count), lambda: self._over(run, count))

    def _over(self, run: _Run, count: int) -> None:
        if run is not self._run or count != run.count:
            return  # it was cut short
        self._is_between = True
        num_decoding = len(self._ends)
        seconds = run.seconds(count)
        begin = self.busy.pop()[0] if self.busy and self.busy[-1][1] == run.began else run.began
        self.busy.append((begin, self._timeline.now))
        if num_decoding:
            self.gaps.append((seconds / count, num_decoding * count))
        self._num_steps += count
        self._context += num_decoding * count
        prompt = run.prompt
        if prompt is not None:
            prompt.num_computed += count * run.size
            prompt.computed_s += seconds
            if not prompt.num_left:
                self._prompts.remove(prompt)
                self._on_computed(prompt)
        while self._ends and self._ends[0][0] <= self._num_steps:
            _, _, job = heappop(self._ends)
            self._context -= job.arrival.num_tokens + job.arrival.num_output
            self._on_ended(job)
        self._is_between = False
        self._plan()

    def _plan(self) -> None:
        for job in self._joining:
            heappush(self._ends, (self._num_steps + job.arrival.num_output - 1, job.number, job))
            self._context += job.arrival.num_tokens + 1
        self._joining.clear()
        prompt, num_decoding = self._next_prompt(), len(self._ends)
        if prompt is None and not num_decoding:
            self._run = None
            return
        engine, first_s, more_s, count, size = self._engine, 0.0, 0.0, math.inf, 0
        if num_decoding:
            first_s = engine.step.seconds(num_decoding, self._context)
            more_s = num_decoding * engine.step.context_s
            count = self._ends[0][0] - self._num_steps
        if prompt is not None:
            cost, left = engine.prompt, prompt.num_left
            size = max(1, engine.chunk_tokens - num_decoding)
            if left > size:
                count = min(count, (left - 1) // size)
            else:
                size, count = left, 1
                first_s += cost.base_s
            first_s += size * (cost.token_s + (prompt.num_computed + size / 2) * cost.pair_s)
            more_s += size * size * cost.pair_s
        self._run = _Run(self._timeline.now, int(count), first_s, more_s, prompt, size)
        self._expect(self._run)

    def _next_prompt(self) -> Job | None:
        """The first that has room, or gets it; nobody overtakes one that waits for room unless he has it already."""
        may_start = True
        for job in self._prompts:
            if job.started_s is not None:
                return job
            if may_start:
                if self._admit(job):
                    return job
                may_start = False
        return None
