"""What placement looks at and what it answers: frozen, made by fleet.py and flow.py, and by the simulation. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from router.costs import PromptCost

Split = Literal["always", "auto", "never"]
AGEING = 3.0  # a prompt is passed by shorter ones until they have taken as many times its own seconds
NOTHING: Mapping[bytes, int] = {}
NO_RATES: Mapping[bytes, float] = {}


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt that was dispatched and has no first token yet. A worker computes those with the least `key` first: the moment it came,
    and AGEING times its seconds."""

    key: float
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at a moment. What this router dispatched is counted by itself, so that reports that lag cannot make a herd."""

    incarnation: bytes
    is_prefill: bool
    can_take: bool  # attached, not draining, heard of lately, not ejected
    num_running: int  # attempts (of a decode worker: choices) that have not ended, of all routers
    max_running: int
    free_tokens: int  # room for KV: as last reported, less what was promised since and has not arrived
    block_size: int
    block_bytes: int
    chunk_s: float  # a step full of prompts
    cost: PromptCost
    queue: Sequence[QueuedPrompt] = ()  # in the order of dispatch; what this router sent
    front_since: float = 0.0  # when the first of them began
    other_queue_s: float = 0.0  # what other routers sent
    step_s: float = 0.0  # of a step that only decodes; 0: not known
    freed_tokens_per_s: float = 0.0  # of KV, by sequences that end; 0: not known
    is_suspect: bool = False  # was wrong or silent lately: taken when there is nobody else
    is_reserved: bool = False  # for a request that is to run alone
    bad_peers: frozenset[bytes] = frozenset()  # a transfer with them broke lately: paired when there is nobody else
    peer_bytes_per_s: Mapping[bytes, float] = field(default_factory=lambda: NO_RATES)  # of a prefill worker, as measured

    @property
    def token_bytes(self) -> float:
        """Of KV."""
        return self.block_bytes / self.block_size

    def is_full(self, now: float) -> bool:
        """Whether even a short prompt would wait for more than a chunk, or finds no lane. One long prompt it may pass."""
        if self.num_running >= self.max_running:
            return True
        if not self.queue:
            return self.other_queue_s > self.chunk_s
        front = max(0.0, self.queue[0].seconds - (now - self.front_since))
        seconds = [front, *(prompt.seconds for prompt in self.queue[1:])]
        return sum(seconds) - max(seconds) + self.other_queue_s > self.chunk_s

    def wait_s(self, key: float, now: float) -> float:
        """Until a prompt with this key is computed."""
        queue = self.queue
        if not queue:
            return self.other_queue_s
        front = queue[0]
        left = front.seconds - (now - self.front_since)
        if left < 0.0:
            left = 0.0
        if front.key > key and left > self.chunk_s:  # it is passed, but not in the middle of a chunk
            left = self.chunk_s
        if len(queue) > 1:
            left += sum([prompt.seconds for prompt in queue[1:] if prompt.key <= key])
        return left + self.other_queue_s


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs."""

    num_tokens: int  # of prompt and what was streamed already
    ends_with_first_token: bool = False
    num_choices: int = 1  # that share the prompt
    depths: Mapping[bytes, int] = field(default_factory=lambda: NOTHING)  # leading blocks of it that a worker has cached
    prefers: frozenset[bytes] = frozenset()  # workers of its session: taken among equals
    avoids: frozenset[bytes] = frozenset()  # an attempt of this request failed there
    is_alone: bool = False  # wants a worker for itself


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` alone: the first token is all there is. `decode` alone: the prompt is computed there."""

    prefill: bytes | None
    decode: bytes | None

    @property
    def computing(self) -> bytes:
        """Who computes the prompt."""
        worker = self.prefill or self.decode
        assert worker is not None
        return worker


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement and what it costs, in seconds."""

    placement: Placement
    wait_s: float  # for prompts before it
    compute_s: float  # of what is not cached
    ship_s: float = 0.0  # of KV, as far as computing does not hide it
    admit_s: float = 0.0  # until the decode worker has room
    delay_s: float = 0.0  # of sequences that run there already
    cached_tokens: int = 0  # where the prompt is computed
    present_tokens: int = 0  # at the decode worker: they are not shipped

    @property
    def cost_s(self) -> float:
        return self.wait_s + self.compute_s + self.ship_s + self.admit_s + self.delay_s


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes. Not `starts_now`: that is the best, but has to be waited for. `explain` lists so many of the cheapest candidates,
    the one that was taken first."""

    placement: Placement
    starts_now: bool
    compute_s: float
    admit_s: float
    explain: Callable[[int], tuple[Candidate, ...]]


@dataclass(frozen=True, slots=True)
class Roles:
    """Who may be placed on."""

    prefills: Sequence[WorkerView]
    decodes: Sequence[WorkerView]


def roles_of(workers: Sequence[WorkerView], avoids: frozenset[bytes] = frozenset(), *, with_reserved: bool = False) -> Roles:
    """Of each role those that can take work and are neither suspect nor avoided, however busy: one that fails fast always has room.
    All that can take work when there are no others."""
    good: dict[bool, list[WorkerView]] = {True: [], False: []}
    worse: dict[bool, list[WorkerView]] = {True: [], False: []}
    for view in workers:
        if view.can_take and (with_reserved or not view.is_reserved):
            is_worse = view.is_suspect or view.incarnation in avoids
            (worse if is_worse else good)[view.is_prefill].append(view)
    return Roles(good[True] or worse[True], good[False] or worse[False])


@dataclass(slots=True)
class Scan:
    """The fleet at the moment when waiting requests are looked at. Those that wait for a worker are ahead of those looked at later."""

    workers: Sequence[WorkerView]
    roles: Roles
    now: float
    ahead_s: dict[bytes, float] = field(default_factory=dict)  # seconds of prompts that wait here for a worker
    closed: set[bytes] = field(default_factory=set)  # decode workers whose next free room is somebody's
