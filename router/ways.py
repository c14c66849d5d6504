"""Every way to serve a request that may be the best, and what it costs. Pure; row by row over plain lists, because it is done for every
request and every worker.

A pair of workers costs the wait for prompts before it, computing what is not cached, shipping what computing does not hide and decode has
not, and the wait for room at decode. Doing the prefill at decode costs the same without shipping, but every sequence that runs there
waits for it. docs/router.md has an example worked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random

from router.views import AGEING, Candidate, Demand, Placement, Scan, WorkerView

UNKNOWN_BYTES_PER_S = 1e9  # of a pair that was not measured
UNKNOWN_STEP_S = 1e-3
SAME, SAME_S = 0.02, 2e-4  # costs within this share, and these seconds, are equal
SESSION, SESSION_S = 0.2, 0.01  # a worker of the session is taken when it costs at most this share, or these seconds, more
NUM_PAIRED = 2  # the cheapest of each role are looked at in pairs
BAD_PAIR_S = 1e6  # more than anything else: a pair whose transfers broke is taken when there is no other


@dataclass(slots=True)
class Computing:
    """Workers that may compute the prompt, and what that costs, row by row."""

    views: list[WorkerView]
    wait_s: list[float]
    compute_s: list[float]
    cached: list[int]


@dataclass(slots=True)
class Receiving:
    """Workers that may generate, row by row."""

    views: list[WorkerView]
    admit_s: list[float]
    delay_s: list[float]
    present: list[int]


@dataclass(slots=True)
class Way:
    """One way to serve the request. Its computer and its receiver are the same worker where the prompt is computed at decode."""

    computer: WorkerView
    receiver: WorkerView | None
    cost_s: float
    wait_s: float
    compute_s: float
    ship_s: float
    admit_s: float
    delay_s: float
    cached: int
    present: int

    def placement(self) -> Placement:
        prefill = self.computer.incarnation if self.computer is not self.receiver else None
        return Placement(prefill, self.receiver.incarnation if self.receiver is not None else None)

    def candidate(self) -> Candidate:
        return Candidate(
            self.placement(),
            self.wait_s,
            self.compute_s,
            self.ship_s,
            self.admit_s,
            self.delay_s,
            self.cached,
            self.present,
        )


def computing_rows(workers: Sequence[WorkerView], scan: Scan, demand: Demand) -> Computing:
    views: list[WorkerView] = []
    waits: list[float] = []
    seconds: list[float] = []
    caches: list[int] = []
    depths, ahead_s, num_tokens, now = demand.depths, scan.ahead_s, demand.num_tokens, scan.now
    most = num_tokens - 1  # one is computed in any case: the first token is drawn from it
    for view in workers:
        running = view.num_running
        if running and (running >= view.max_running or demand.is_alone):
            continue
        name = view.incarnation
        cached = min(depths[name] * view.block_size, most) if name in depths else 0
        cost, new = view.cost, num_tokens - cached
        compute_s = cost.base_s + new * (cost.token_s + (cached + 0.5 * new) * cost.pair_s)
        wait_s = 0.0
        if view.queue or view.other_queue_s:
            wait_s = view.wait_s(now + AGEING * compute_s, now)
        if ahead_s:
            wait_s += ahead_s.get(name, 0.0)
        views.append(view)
        waits.append(wait_s)
        seconds.append(compute_s)
        caches.append(cached)
    return Computing(views, waits, seconds, caches)


def receiving_rows(workers: Sequence[WorkerView], scan: Scan, demand: Demand) -> Receiving:
    """Without those that have no room, where none can be foreseen."""
    views: list[WorkerView] = []
    admits: list[float] = []
    delays: list[float] = []
    presents: list[int] = []
    depths, closed, num_tokens, num_choices = demand.depths, scan.closed, demand.num_tokens, demand.num_choices
    for view in workers:
        running = view.num_running
        if running and (running + min(num_choices, view.max_running) > view.max_running or demand.is_alone):
            continue
        name = view.incarnation
        if name in closed:
            continue
        admit_s = 0.0
        if num_tokens > view.free_tokens:
            if view.freed_tokens_per_s <= 0:
                continue
            admit_s = max(num_tokens - view.free_tokens, view.block_size) / view.freed_tokens_per_s
        views.append(view)
        admits.append(admit_s)
        delays.append(running * (view.step_s or UNKNOWN_STEP_S))
        presents.append(min(depths[name] * view.block_size, num_tokens) if name in depths else 0)
    return Receiving(views, admits, delays, presents)


def local_ways(receiving: Receiving, scan: Scan, demand: Demand, margin_s: float, most_s: float = inf) -> list[Way]:
    """The prompt is computed where the answer is generated, and those that run there wait for it. The cheapest of those that may cost
    less than `most_s`, and those of the session."""
    rows = list(range(len(receiving.views)))
    if most_s < inf:  # most need no closer look
        depth_of, num_tokens, most_s = demand.depths.get, demand.num_tokens, most_s - margin_s
        rows = [
            i
            for i, view in enumerate(receiving.views)
            if view.cost.token_s * (num_tokens - depth_of(view.incarnation, 0) * view.block_size) * (1 + view.num_running) <= most_s
        ]
    local = computing_rows([receiving.views[i] for i in rows], scan, demand)
    assert len(local.views) == len(rows), "a worker with room for the answer has none for the prompt"
    delays = [
        receiving.delay_s[i] + compute_s * view.num_running + margin_s
        for i, view, compute_s in zip(rows, local.views, local.compute_s, strict=True)
    ]
    admits = [receiving.admit_s[i] for i in rows]
    costs = [sum(parts) for parts in zip(local.wait_s, local.compute_s, admits, delays, strict=True)]
    ways = []
    for i in _near(costs, local.views, demand):
        view, cached = local.views[i], local.cached[i]
        ways.append(Way(view, view, costs[i], local.wait_s[i], local.compute_s[i], 0.0, admits[i], delays[i], cached, cached))
    return ways


def split_ways(computing: Computing, receiving: Receiving, demand: Demand, random: Random) -> list[Way]:
    """The cheapest of each role, in pairs."""
    costs = list(map(float.__add__, computing.wait_s, computing.compute_s))
    if demand.ends_with_first_token:
        return [
            Way(view, None, costs[i], computing.wait_s[i], computing.compute_s[i], 0.0, 0.0, 0.0, computing.cached[i], 0)
            for i, view in enumerate(computing.views)
        ]
    if not receiving.views:
        return []
    few = _few(costs, computing.views, demand, random)
    # What a receiver has already is worth what shipping it over the fastest pair would take.
    fastest = max((max(computing.views[i].peer_bytes_per_s.values(), default=0.0) for i in few), default=0.0) or UNKNOWN_BYTES_PER_S
    worth = [
        admit_s + delay_s - present * view.token_bytes / fastest if present else admit_s + delay_s
        for view, admit_s, delay_s, present in zip(
            receiving.views, receiving.admit_s, receiving.delay_s, receiving.present, strict=True
        )
    ]
    receivers = _few(worth, receiving.views, demand, random)
    ways = []
    for i in few:
        bad = computing.views[i].bad_peers
        good = receivers
        if bad:  # lately: any other pair will do
            good = [j for j, view in enumerate(receiving.views) if view.incarnation not in bad] or receivers
        ways += [pair_way(computing, i, receiving, j, demand) for j in good]
    return ways


def pair_way(computing: Computing, i: int, receiving: Receiving, j: int, demand: Demand) -> Way:
    prefill, decode = computing.views[i], receiving.views[j]
    rate = prefill.peer_bytes_per_s.get(decode.incarnation) or UNKNOWN_BYTES_PER_S
    present, wait_s, compute_s = receiving.present[j], computing.wait_s[i], computing.compute_s[i]
    admit_s, delay_s = receiving.admit_s[j], receiving.delay_s[j]
    whole_s = -(-(demand.num_tokens - present) // decode.block_size) * decode.block_bytes / rate
    last_s = whole_s * min(1.0, prefill.chunk_s / compute_s) if compute_s else whole_s  # a chunk is shipped once it is computed
    ship_s = max(whole_s - compute_s, last_s)
    cost_s = wait_s + compute_s + ship_s + admit_s + delay_s
    if prefill.bad_peers and decode.incarnation in prefill.bad_peers:
        cost_s += BAD_PAIR_S
    return Way(prefill, decode, cost_s, wait_s, compute_s, ship_s, admit_s, delay_s, computing.cached[i], present)


def _few(costs: Sequence[float], views: Sequence[WorkerView], demand: Demand, random: Random) -> list[int]:
    """Rows of at most NUM_PAIRED: the cheapest, drawn where more cost the same; and those of the session."""
    if len(costs) <= NUM_PAIRED:
        return list(range(len(costs)))
    order = sorted(range(len(costs)), key=costs.__getitem__)
    num_equal = NUM_PAIRED
    while num_equal < len(order) and costs[order[num_equal]] <= costs[order[0]] + SAME_S:
        num_equal += 1
    few = random.sample(order[:num_equal], NUM_PAIRED) if num_equal > NUM_PAIRED else order[:NUM_PAIRED]
    return few + _of_session(views, demand, few)


def _near(costs: Sequence[float], views: Sequence[WorkerView], demand: Demand) -> list[int]:
    """Rows that may be the best of all: those that cost as much as the cheapest, and those of the session."""
    if not costs:
        return []
    most = min(costs) * (1 + SAME) + SAME_S
    near = [i for i, cost in enumerate(costs) if cost <= most]
    return near + _of_session(views, demand, near)


def _of_session(views: Sequence[WorkerView], demand: Demand, but: Sequence[int]) -> list[int]:
    if not demand.prefers:
        return []
    return [i for i, view in enumerate(views) if view.incarnation in demand.prefers and i not in but]


def pick(ways: Sequence[Way], demand: Demand, random: Random) -> Way:
    """The cheapest; a session's worker wins among those that cost little more."""
    least = min(map(cost_of, ways))
    same = least * (1 + SAME) + SAME_S
    if demand.prefers:
        most = max(least * (1 + SESSION), least + SESSION_S)
        mine = [way for way in ways if way.cost_s <= most and way.computer.incarnation in demand.prefers]
        both = [way for way in mine if way.receiver is not None and way.receiver.incarnation in demand.prefers]
        if mine:
            return min(both or mine, key=cost_of)
    equal = [way for way in ways if way.cost_s <= same]
    return equal[0] if len(equal) == 1 else random.choice(equal)


def explain(best: Way, ways: Sequence[Way], count: int) -> tuple[Candidate, ...]:
    others = sorted((way for way in ways if way is not best), key=cost_of)[: count - 1] if count > 1 else ()
    return (best.candidate(), *(way.candidate() for way in others))


def cost_of(way: Way) -> float:
    return way.cost_s
