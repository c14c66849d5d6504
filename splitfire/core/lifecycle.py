"""States as tables. A state changes only to what `advance` returns; what a table does not name raises and changes nothing.

Owned here: the life of a sequence inside an engine and of an attempt inside the router. The hand-off's two tables are
in `kvtransfer/protocol.py`, because only the hand-off knows their events.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class IllegalTransition(Exception):
    """A state machine was given an event its state does not accept: a bug here, or a peer that broke the protocol."""


def advance(table: Mapping[State, Mapping[Event, State]], state: State, event: Event) -> State:
    """The state that follows `state` after `event`; IllegalTransition when the table names none."""
    following = table.get(state, {}).get(event)
    if following is None:
        raise IllegalTransition(f"{event.name} is not possible in {type(state).__name__}.{state.name}")
    return following


class Seq(Enum):
    """A sequence in one engine."""

    WAITING = "waiting"  # in the queue, holds no block
    RUNNING = "running"  # holds blocks, is scheduled every step
    HELD = "held"  # prompt computed, its blocks stay for the hand-off
    FINISHED = "finished"  # holds nothing


class SeqEvent(Enum):
    """What can happen to a sequence."""

    ADMIT = "admit"
    PREEMPT = "preempt"
    HOLD = "hold"
    FINISH = "finish"


SEQUENCE: dict[Seq, dict[SeqEvent, Seq]] = {
    Seq.WAITING: {SeqEvent.ADMIT: Seq.RUNNING, SeqEvent.FINISH: Seq.FINISHED},
    Seq.RUNNING: {SeqEvent.PREEMPT: Seq.WAITING, SeqEvent.HOLD: Seq.HELD, SeqEvent.FINISH: Seq.FINISHED},
    Seq.HELD: {SeqEvent.FINISH: Seq.FINISHED},
    Seq.FINISHED: {},
}


class Req(Enum):
    """One choice of a request in the router; every choice ends in exactly one of the last three."""

    ACCEPTED = "accepted"
    ADMITTED = "admitted"
    DISPATCHED = "dispatched"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ReqEvent(Enum):
    """What can happen to a choice."""

    ADMIT = "admit"
    DISPATCH = "dispatch"
    TOKEN = "token"  # noqa: S105 - not a password
    RESUBMIT = "resubmit"  # the attempt was lost: place and dispatch again
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


_ENDS = {ReqEvent.FAIL: Req.FAILED, ReqEvent.CANCEL: Req.CANCELLED}
REQUEST: dict[Req, dict[ReqEvent, Req]] = {
    Req.ACCEPTED: {ReqEvent.ADMIT: Req.ADMITTED, **_ENDS},
    Req.ADMITTED: {ReqEvent.DISPATCH: Req.DISPATCHED, ReqEvent.RESUBMIT: Req.ADMITTED, ReqEvent.FINISH: Req.DONE, **_ENDS},
    Req.DISPATCHED: {ReqEvent.TOKEN: Req.STREAMING, ReqEvent.RESUBMIT: Req.ADMITTED, ReqEvent.FINISH: Req.DONE, **_ENDS},
    Req.STREAMING: {ReqEvent.TOKEN: Req.STREAMING, ReqEvent.RESUBMIT: Req.ADMITTED, ReqEvent.FINISH: Req.DONE, **_ENDS},
    Req.DONE: {},
    Req.FAILED: {},
    Req.CANCELLED: {},
}
