"""Where a request goes, compared in seconds. Pure: a scan of the fleet and a demand in, a decision or None out.

What each way to serve it costs is in ways.py. Ties are broken at random, or a quiet system would send everything to one worker.

The cheapest may have to be waited for: then the request waits in the router, where it can be refused, cancelled and reordered, and counts
as that worker's queue for those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random

from router.policies import Policy
from router.views import Decision, Demand, Placement, Roles, Scan, Split, WorkerView, roles_of
from router.ways import Computing, Way, computing_rows, cost_of, explain, local_ways, pair_way, pick, receiving_rows, split_ways

LOCAL_MARGIN_S = 0.02  # what local prefill costs sequences that are about to arrive
HIDDEN = 0.5  # room that is expected within this share of wait and computing is there in time


@dataclass(frozen=True, slots=True)
class Rules:
    """How a router places. Without a `policy`: by cost."""

    split: Split = "auto"
    policy: Policy | None = None
    local_fallback: bool = True  # decode computes prompts when there is no prefill worker


def missing_role(workers: Sequence[WorkerView], rules: Rules) -> str | None:
    """The reason (`no_decode`, `no_prefill`) why no request can be placed however long it waits; None if one can."""
    has_prefill = has_decode = False
    for worker in workers:
        if worker.can_take:
            has_prefill |= worker.is_prefill
            has_decode |= not worker.is_prefill
    if not has_decode:
        return "no_decode"
    needs_prefill = rules.split == "always" or (rules.split == "auto" and not rules.local_fallback)
    return "no_prefill" if needs_prefill and not has_prefill else None


def place(scan: Scan, demand: Demand, rules: Rules, random: Random) -> Decision | None:
    """The best placement, and whether it starts now; None: nobody has room, or will have any that can be foreseen."""
    roles = _trusted(scan, demand)
    prefills, decodes = roles.prefills, roles.decodes
    falls_back = rules.split == "auto" and not prefills and rules.local_fallback
    is_local = rules.split == "never" or falls_back or demand.is_alone  # one worker is enough to be lost
    if rules.policy is not None:
        return _by_policy(scan, demand, rules.policy, [] if is_local else prefills, decodes, random)
    ways: list[Way] = []
    receiving = receiving_rows(decodes, scan, demand)
    if not is_local and prefills:
        ways = split_ways(computing_rows(prefills, scan, demand), receiving, demand, random)
    if is_local:
        ways = local_ways(receiving, scan, demand, 0.0)
    elif rules.split == "auto" and prefills:
        ways += local_ways(receiving, scan, demand, LOCAL_MARGIN_S, min(map(cost_of, ways), default=inf))
    if not ways:
        return None
    best = pick(ways, demand, random)
    starts_now = best.wait_s <= best.computer.chunk_s and best.admit_s <= HIDDEN * (best.wait_s + best.compute_s)
    return Decision(best.placement(), starts_now, best.compute_s, best.admit_s, lambda count: explain(best, ways, count))


def place_again(scan: Scan, demand: Demand, placement: Placement, random: Random) -> Placement | None:
    """Another decode worker for a prompt whose hand-off to `placement.decode` failed; None: nobody else has room now."""
    prefill = next((w for w in scan.workers if w.incarnation == placement.prefill), None)
    if prefill is None:
        return None
    able = [w for w in scan.workers if not w.is_prefill and w.can_take and w.incarnation not in demand.avoids]
    receiving = receiving_rows([w for w in able if w.incarnation not in prefill.bad_peers], scan, demand)
    rows = range(len(receiving.views))
    ways = [pair_way(Computing([prefill], [0.0], [0.0], [0]), 0, receiving, j, demand) for j in rows if not receiving.admit_s[j]]
    return pick(ways, demand, random).placement() if ways else None


def wait_behind(decision: Decision, scan: Scan) -> None:
    """The request goes on waiting, for the worker that is best for it: those looked at later are behind it."""
    worker = decision.placement.computing
    scan.ahead_s[worker] = scan.ahead_s.get(worker, 0.0) + decision.compute_s


# -- by another policy, to be compared with


def _by_policy(
    scan: Scan, demand: Demand, policy: Policy, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], random: Random
) -> Decision | None:
    """Of those that have room now."""
    receiving = receiving_rows(decodes, scan, demand)
    with_room = [j for j, admit_s in enumerate(receiving.admit_s) if not admit_s]
    computing = computing_rows(prefills or [receiving.views[j] for j in with_room], scan, demand)
    free = [i for i, wait_s in enumerate(computing.wait_s) if wait_s <= computing.views[i].chunk_s]
    if not free or not (with_room or demand.ends_with_first_token):
        return None
    i = _row_of(policy([computing.views[i] for i in free], random), computing.views)
    view, wait_s, compute_s, cached = computing.views[i], computing.wait_s[i], computing.compute_s[i], computing.cached[i]
    if not prefills or demand.ends_with_first_token:
        way = Way(view, None if prefills else view, 0.0, wait_s, compute_s, 0.0, 0.0, 0.0, cached, 0)
        return _decided(way)
    able = [receiving.views[j] for j in with_room]
    good = [decode for decode in able if decode.incarnation not in view.bad_peers] or able
    j = _row_of(policy(good, random), receiving.views)
    return _decided(pair_way(computing, i, receiving, j, demand))


def _decided(way: Way) -> Decision:
    return Decision(way.placement(), True, way.compute_s, way.admit_s, lambda _count: (way.candidate(),))


def _row_of(worker: bytes, views: Sequence[WorkerView]) -> int:
    return next(i for i, view in enumerate(views) if view.incarnation == worker)


def _trusted(scan: Scan, demand: Demand) -> Roles:
    """Of each role those that can take work and are neither suspect, avoided nor reserved, however busy: one that fails fast always
    has room. All that can take work when there are no others."""
    if not demand.avoids and not demand.is_alone:
        return scan.roles
    return roles_of(scan.workers, demand.avoids, with_reserved=demand.is_alone)
