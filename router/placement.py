"""Which workers a request goes to. Pure: a snapshot of the fleet in, a placement or None out.

Least loaded by the router's own counts (what it dispatched and has not seen end), so that reports that lag cannot make a
herd; ties are broken at random, or a quiet system would send everything to one worker. Of decode workers that tie, those
that the prompt's KV would take at least twice as long to reach are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

Split = Literal["always", "auto", "never"]
# Times. Less is noise: of the pairs of a fleet that starts all at once, one was measured 3.8 times slower than another.
MUCH_SLOWER = 4.0
_UNMEASURED: Mapping[bytes, float] = {}


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as placement sees it."""

    incarnation: bytes
    is_prefill: bool
    can_take: bool  # attached, not draining, heard of lately
    num_running: int  # attempts (of a decode worker: choices) dispatched by this router that have not ended
    queued_tokens: int  # prompt tokens dispatched whose first token has not come
    max_running: int
    chunk_tokens: int
    block_size: int
    free_blocks: int
    is_suspect: bool = False  # broke the protocol lately: taken when there is nobody else
    bad_peers: frozenset[bytes] = frozenset()  # a transfer with them broke lately: paired when there is nobody else
    peer_bytes_per_s: Mapping[bytes, float] = field(default_factory=dict)  # of a prefill worker: to decode workers, as measured

    @property
    def has_prefill_room(self) -> bool:
        """Its queue is at most one chunk: what is dispatched now starts with the next step."""
        return self.queued_tokens < self.chunk_tokens and self.num_running < self.max_running

    def has_decode_room(self, demand: Demand) -> bool:
        """Free blocks are as last reported; what was promised since, the grant sorts out."""
        has_blocks = self.free_blocks * self.block_size >= demand.num_tokens
        return self.num_running + min(demand.num_choices, self.max_running) <= self.max_running and has_blocks


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs. `prefers` are workers that may hold its session's cache."""

    num_tokens: int  # to compute
    ends_with_first_token: bool
    prefers: frozenset[bytes] = frozenset()
    avoids: frozenset[bytes] = frozenset()  # an attempt of this request failed there
    num_choices: int = 1  # that share the prompt


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` alone: the first token is all there is. `decode` alone: the prompt is computed there."""

    prefill: bytes | None
    decode: bytes | None


def missing_role(workers: Sequence[WorkerView], split: Split) -> str | None:
    """The reason (`no_decode`, `no_prefill`) why no request can be placed however long it waits; None if one can."""
    usable = [w for w in workers if w.can_take]
    if not any(not w.is_prefill for w in usable):
        return "no_decode"
    if split == "always" and not any(w.is_prefill for w in usable):
        return "no_prefill"
    return None


def place(workers: Sequence[WorkerView], demand: Demand, split: Split, random: Random) -> Placement | None:
    """None: nobody has room now, wait."""
    prefills = _trusted([w for w in workers if w.is_prefill], demand)
    decodes = _trusted([w for w in workers if not w.is_prefill], demand)
    if split == "never" or (split == "auto" and not prefills):
        whole = _least_loaded([w for w in decodes if w.has_prefill_room], demand, random)
        return Placement(None, whole.incarnation) if whole is not None else None
    prefill = _least_loaded([w for w in prefills if w.has_prefill_room], demand, random)
    if prefill is None:
        return None
    if demand.ends_with_first_token:
        return Placement(prefill.incarnation, None)
    decode = _decode_for(prefill, decodes, demand, random)
    return Placement(prefill.incarnation, decode.incarnation) if decode is not None else None


def place_again(workers: Sequence[WorkerView], demand: Demand, placement: Placement, random: Random) -> Placement | None:
    """Another decode worker for a prompt whose hand-off to `placement.decode` failed; None: nobody else has room now."""
    prefill = next((w for w in workers if w.incarnation == placement.prefill), None)
    others = [w for w in workers if not w.is_prefill and w.can_take and w.incarnation not in demand.avoids]
    if prefill is None:
        return None
    decode = _decode_for(prefill, [w for w in others if w.incarnation not in prefill.bad_peers], demand, random)
    return Placement(placement.prefill, decode.incarnation) if decode is not None else None


def _decode_for(prefill: WorkerView, decodes: Sequence[WorkerView], demand: Demand, random: Random) -> WorkerView | None:
    good = [w for w in decodes if w.incarnation not in prefill.bad_peers] or decodes
    return _least_loaded([w for w in good if w.has_decode_room(demand)], demand, random, prefill.peer_bytes_per_s)


def _trusted(workers: Sequence[WorkerView], demand: Demand) -> list[WorkerView]:
    """Those that can take work and are neither suspect nor avoided, however busy: one that fails fast always has room.
    All that can take work when there are no others."""
    usable = [w for w in workers if w.can_take]
    return [w for w in usable if not w.is_suspect and w.incarnation not in demand.avoids] or usable


def _least_loaded(
    workers: Sequence[WorkerView], demand: Demand, random: Random, bytes_per_s: Mapping[bytes, float] = _UNMEASURED
) -> WorkerView | None:
    """A worker the session prefers wins only among equals of at most one request more."""
    if not workers:
        return None
    least = min(_load(w) for w in workers)
    slack = workers[0].chunk_tokens if workers[0].is_prefill else 1
    preferred = [w for w in workers if w.incarnation in demand.prefers and _load(w) <= least + slack]
    return random.choice(preferred or _near([w for w in workers if _load(w) == least], bytes_per_s))


def _near(workers: Sequence[WorkerView], bytes_per_s: Mapping[bytes, float]) -> list[WorkerView]:
    """Without those much slower to reach than the fastest. What was not measured is not known to be slow."""
    fastest = max((bytes_per_s.get(w.incarnation, 0.0) for w in workers), default=0.0)
    return [w for w in workers if bytes_per_s.get(w.incarnation, fastest) * MUCH_SLOWER > fastest or not fastest]


def _load(worker: WorkerView) -> int:
    return worker.queued_tokens if worker.is_prefill else worker.num_running
