"""A place for a request: what it demands, where it goes, and why. Event loop only; placement.py decides."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from router.choice import Choice
from router.fleet import Fleet
from router.placement import Rules, place, place_again, wait_behind
from router.views import Decision, Demand, Placement, Scan, WorkerView
from router.worker_handle import PromptWork
from splitfire.core.hashing import BlockHash, chain_root, hash_blocks, short_names

MAX_SESSIONS = 10_000
MAX_DECISIONS = 64  # kept for those who ask why
STARVED_S = 1.0  # who waits longer for room at decode is not passed by others any more


@dataclass(frozen=True, slots=True)
class Room:
    """Where an attempt goes, what computing its prompt is expected to take, and its full blocks: their hashes, and short names of these."""

    placement: Placement
    work: PromptWork
    block_hashes: Sequence[BlockHash]
    block_names: Sequence[int]


@dataclass(frozen=True, slots=True)
class Placed:
    """A decision that was carried out."""

    request_id: str
    num_tokens: int
    decision: Decision


class Placing:
    """Finds rooms. Remembers which workers a session had, and the latest decisions."""

    def __init__(self, fleet: Fleet, rules: Rules, random: Random) -> None:
        self.rules = rules
        self.latest: deque[Placed] = deque(maxlen=MAX_DECISIONS)
        self._fleet = fleet
        self._random = random
        self._sessions: dict[str, frozenset[bytes]] = {}

    def begin_scan(self) -> Scan | None:
        """The fleet now; None when no worker has room for any prompt."""
        scan = self._fleet.scan()
        return scan if _has_room(scan) else None

    def find(self, scan: Scan, choices: Sequence[Choice]) -> Room | None:
        """A room that is free now. None: the request goes on waiting, for the worker that is best for it."""
        choice = choices[0]
        began = time.monotonic()
        if self._fleet.look_again(scan) and not _has_room(scan):  # others have been given room meanwhile
            return None
        if choice.tries.is_alone:
            self._fleet.reserve(choice)
        demand = self._demand(choices)
        decision = place(scan, demand, self.rules, self._random)
        is_starved = began - choice.timeline.queued_at > STARVED_S
        if decision is None:
            if is_starved:
                _close_emptiest(scan)
            return None
        if not decision.starts_now:
            wait_behind(decision, scan)
            if is_starved and decision.admit_s and decision.placement.decode is not None:
                scan.closed.add(decision.placement.decode)
            return None
        for one in choices:
            one.timeline.place_began, one.timeline.placed_at = began, time.monotonic()
        self.latest.appendleft(Placed(choice.plan.request_id, demand.num_tokens, decision))
        computing = next(view for view in scan.workers if view.incarnation == decision.placement.computing)
        return Room(decision.placement, _work(demand, computing), choice.block_hashes, choice.block_names)

    def find_again(self, choices: Sequence[Choice], placement: Placement) -> Placement | None:
        """Another decode worker for a prompt that is held; None: there is none now."""
        demand = self._demand(choices)
        return place_again(self._fleet.scan(), demand, placement, self._random)

    def least_work(self, choice: Choice) -> PromptWork:
        """Computing its prompt, where that takes least."""
        demand = self._demand([choice])
        works = [_work(demand, view) for view in self._fleet.scan().workers]
        return min(works, key=lambda work: work.seconds, default=PromptWork(demand.num_tokens, 0, 0.0))

    def remember(self, session_id: str, placement: Placement) -> None:
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = frozenset(filter(None, (placement.prefill, placement.decode)))
        while len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    # -- inside

    def _demand(self, choices: Sequence[Choice]) -> Demand:
        choice = choices[0]
        plan = choice.plan
        names = self._names(choice)
        return Demand(
            num_tokens=len(plan.prompt) + len(choice.ids),
            ends_with_first_token=plan.stopping.max_tokens - len(choice.ids) == 1,
            num_choices=len(choices),
            depths=self._fleet.depths(names) if names else {},
            prefers=self._sessions.get(plan.session_id, frozenset()) if plan.session_id else frozenset(),
            avoids=frozenset(choice.failed_at),
            is_alone=choice.tries.is_alone,
        )

    def _names(self, choice: Choice) -> Sequence[int]:
        """Of the full blocks of prompt and what was streamed; hashed once."""
        fingerprint = self._fleet.fingerprint
        if fingerprint is None:
            return ()
        num_tokens = len(choice.plan.prompt) + len(choice.ids)
        digest = self._fleet.model_digest
        key = (digest, num_tokens // fingerprint.block_size)
        if choice.hashed != key:
            root = chain_root(choice.plan.cache_salt, digest, "")
            tokens = (*choice.plan.prompt, *choice.ids) if choice.ids else choice.plan.prompt
            choice.hashed = key
            choice.block_hashes = hash_blocks(root, tokens, fingerprint.block_size)
            choice.block_names = short_names(choice.block_hashes)
        return choice.block_names


def _work(demand: Demand, view: WorkerView) -> PromptWork:
    """Computing its prompt at one worker."""
    cached = min(demand.depths.get(view.incarnation, 0) * view.block_size, demand.num_tokens - 1)
    return PromptWork(demand.num_tokens, cached, view.cost.seconds(demand.num_tokens, cached))


def _close_emptiest(scan: Scan) -> None:
    """The next room that a decode worker has is for who has waited long: of the one that has most already."""
    open_ones = [view for view in scan.roles.decodes if view.incarnation not in scan.closed]
    if open_ones:
        scan.closed.add(max(open_ones, key=lambda view: view.free_tokens).incarnation)


def _has_room(scan: Scan) -> bool:
    return any(view.can_take and not view.is_full(scan.now) for view in scan.workers)
