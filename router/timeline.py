"""Where the time of one choice goes: phases that follow one another, leg by leg, on the router's clock. Pure.

A leg ends when the router hands the client's stream the first token, the second, the last. Workers tell durations, never instants;
they are laid out where they belong, and what is left between them is on the way: `transit` to a worker and back, `wire` of a
hand-off, `stream` to the client. So the phases of a leg always add up to it. What a worker did before a leg began, because the
token before was late at the client, is not part of it: phases are cut from the front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitfire.v1.inference_pb2 import LEG_FIRST_TOKEN, LEG_REST, LEG_SECOND_TOKEN, LEG_UNSPECIFIED, KvTransfer, Leg, Phase

ROUTER = "router"
LEG_NAMES = {LEG_UNSPECIFIED: "", LEG_FIRST_TOKEN: "first_token", LEG_SECOND_TOKEN: "second_token", LEG_REST: "rest"}
MOST_S = 86400.0  # a worker that says more of a phase is wrong, and too long a number would drown the others


@dataclass(slots=True)
class Timeline:
    """Of one choice, over all its attempts. Instants are of this process's clock."""

    accepted_at: float
    queued_at: float = 0.0
    place_began: float = 0.0
    placed_at: float = 0.0
    first_token_at: float | None = None  # when it came
    second_token_at: float | None = None
    first_sent_at: float | None = None  # when the client's stream had it
    second_sent_at: float | None = None
    last_sent_at: float | None = None
    cached_tokens: int = 0
    prefill_busy_s: float = 0.0  # shares of steps, of all attempts as far as they told
    decode_busy_s: float = 0.0
    kv_transfer: KvTransfer | None = None
    _first: list[Phase] = field(default_factory=list)
    _marked_at: float | None = None  # where they end
    _prompt: Sequence[Phase] = ()  # what the worker told that computed the prompt; decode's first frame may be here before
    _shipped: Sequence[Phase] = ()  # what a hand-off's sender told
    _second: Sequence[Phase] = ()
    _rest: Sequence[Phase] = ()
    _before: dict[Leg.ValueType, list[Phase]] = field(default_factory=dict)  # of attempts that were interrupted in a leg
    _broken_at: float | None = None  # the attempt before, after the first token
    _resumed_at: float | None = None

    # -- what happens

    def mark(self, name: str, now: float) -> None:
        """What was done until now, on the way to the first token."""
        if self.first_token_at is None:
            began = self.accepted_at if self._marked_at is None else self._marked_at
            self._first.append(_phase(LEG_FIRST_TOKEN, name, now - began))
            self._marked_at = max(began, now)

    def queued(self, now: float) -> None:
        """An attempt waits for a place."""
        self.mark("accept" if self._marked_at is None else "backoff", now)
        self.queued_at = now

    def dispatched(self, now: float) -> None:
        self.mark("admit", self.place_began)
        self.mark("place", self.placed_at)
        self.mark("dispatch", now)

    def interrupted(self, now: float) -> None:
        """The attempt failed, and another one will follow."""
        if self.first_token_at is None:
            self._prompt = ()
            self.mark("failed", now)
            return
        self._shipped, self._rest = (), ()
        if self._broken_at is None:
            self._broken_at = now
            leg = LEG_SECOND_TOKEN if self.second_token_at is None else LEG_REST
            began = self._resumed_at or (self.first_token_at if self.second_token_at is None else self.second_token_at)
            self._before.setdefault(leg, []).append(_phase(leg, "decode", now - began))

    def told(self, phases: Iterable[Phase], had: int, has: int, now: float) -> None:
        """Tokens came, or a worker's phases, or both: the choice had `had` tokens before."""
        of_leg = _by_leg(phases)
        if self._broken_at is not None and has > had:
            leg = LEG_SECOND_TOKEN if self.second_token_at is None else LEG_REST
            self._before.setdefault(leg, []).append(_phase(leg, "recover", now - self._broken_at))
            self._broken_at, self._resumed_at = None, now
            of_leg = {}
        if had == 0 < has:
            self.first_token_at = now
        if not self._before:
            self._prompt = self._prompt or of_leg.get(LEG_FIRST_TOKEN, ())
        if had < 2 <= has:
            self.second_token_at = now
            self._second = of_leg.get(LEG_SECOND_TOKEN, ())

    def shipped(self, phases: Iterable[Phase]) -> None:
        """The prefill worker's last word: what kept the second token waiting there."""
        if LEG_SECOND_TOKEN not in self._before:
            self._shipped = _by_leg(phases).get(LEG_SECOND_TOKEN, ())

    def finished(self, phases: Iterable[Phase]) -> None:
        """The last word of the worker that generated."""
        self._rest = _by_leg(phases).get(LEG_REST, ())

    def sent(self, num_sent: int, now: float) -> None:
        """The client's stream has so many tokens."""
        if self.first_sent_at is None and num_sent >= 1:
            self.first_sent_at = now
        if self.second_sent_at is None and num_sent >= 2:
            self.second_sent_at = now
        self.last_sent_at = now

    # -- what it comes to

    @property
    def first_token_s(self) -> float:
        return self.first_sent_at - self.accepted_at if self.first_sent_at is not None else 0.0

    @property
    def second_token_s(self) -> float:
        return (
            self.second_sent_at - self.first_sent_at if self.second_sent_at is not None and self.first_sent_at is not None else 0.0
        )

    @property
    def rest_s(self) -> float:
        return self.last_sent_at - self.second_sent_at if self.second_sent_at is not None and self.last_sent_at is not None else 0.0

    def phases(self) -> list[Phase]:
        """All of them, by start; those of each leg add up to it."""
        return _laid_out([*self._first_leg(), *self._second_leg(), *self._rest_leg()])

    def _first_leg(self) -> list[Phase]:
        if self.first_sent_at is None or self.first_token_at is None:
            return self._first
        began = self._marked_at if self._marked_at is not None else self.accepted_at
        at_workers = _fill(self._prompt, self.first_token_at - began, "transit", LEG_FIRST_TOKEN)
        return [*self._first, *at_workers, _phase(LEG_FIRST_TOKEN, "stream", self.first_sent_at - self.first_token_at)]

    def _second_leg(self) -> list[Phase]:
        if self.second_sent_at is None or self.first_sent_at is None or self.second_token_at is None:
            return []
        stream_s = self.second_sent_at - max(self.second_token_at, self.first_sent_at)
        before = self._before.get(LEG_SECOND_TOKEN, [])
        between = "wire" if any(phase.name == "unpack" for phase in self._second) else "transit"
        gap = _phase(LEG_SECOND_TOKEN, between, self.second_token_s - stream_s - _total([*before, *self._shipped, *self._second]))
        parts = [*before, *self._shipped, gap, *self._second, _phase(LEG_SECOND_TOKEN, "stream", stream_s)]
        return _cut(parts, self.second_token_s)

    def _rest_leg(self) -> list[Phase]:
        """Totals that took turns step by step: where they are longer than the leg, all of them are shortened alike."""
        if not self.rest_s:
            return []
        parts = [*self._before.get(LEG_REST, []), *self._rest]
        left_s = self.rest_s - _total(parts)
        if left_s < 0:
            return [_like(part, part.duration_s * self.rest_s / _total(parts)) for part in parts]
        if not self._rest:  # nobody told, because a stop string ended it
            return [*parts, _phase(LEG_REST, "decode", left_s)]
        return [*parts, _phase(LEG_REST, "stream", left_s)]


def _phase(leg: Leg.ValueType, name: str, duration_s: float) -> Phase:
    return Phase(name=name, duration_s=max(0.0, duration_s), worker=ROUTER, leg=leg)


def _like(phase: Phase, duration_s: float) -> Phase:
    copy = Phase()
    copy.CopyFrom(phase)
    copy.duration_s = duration_s
    return copy


def _total(phases: Iterable[Phase]) -> float:
    return sum(phase.duration_s for phase in phases)


def believed_s(seconds: float) -> float:
    """What a worker says of its own time, as far as it makes sense: neither negative nor endless, and a number."""
    return seconds if 0 <= seconds <= MOST_S else 0.0


def _by_leg(phases: Iterable[Phase]) -> dict[Leg.ValueType, Sequence[Phase]]:
    """What a worker says is believed as far as it makes sense."""
    found: dict[Leg.ValueType, list[Phase]] = {}
    for phase in phases:
        if believed_s(phase.duration_s):
            found.setdefault(phase.leg, []).append(phase)
    return {leg: tuple(of_leg) for leg, of_leg in found.items()}


def _fill(phases: Sequence[Phase], seconds: float, rest: str, leg: Leg.ValueType) -> list[Phase]:
    """These, and what is left of `seconds` by the name `rest`."""
    return _cut([*phases, _phase(leg, rest, seconds - _total(phases))], seconds)


def _cut(phases: Sequence[Phase], seconds: float) -> list[Phase]:
    """The last `seconds` of what they come to."""
    over_s = _total(phases) - seconds
    kept = []
    for phase in phases:
        cut_s = min(max(0.0, over_s), phase.duration_s)
        over_s -= cut_s
        if phase.duration_s > cut_s:
            kept.append(_like(phase, phase.duration_s - cut_s) if cut_s else phase)
    return kept


def _laid_out(phases: Iterable[Phase]) -> list[Phase]:
    """One behind another."""
    at, laid = 0.0, []
    for phase in phases:
        if phase.duration_s > 0:
            copy = _like(phase, phase.duration_s)
            copy.start_s = at
            at += phase.duration_s
            laid.append(copy)
    return laid
