"""The hand-off's two state machines, as tables. What a table does not name raises and changes nothing.

`docs/protocol.md` is printed from here (`python -m kvtransfer.protocol`), and a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

WITHDRAWN = "withdrawn"  # reason of an abort that is no failure: the request needs no hand-off any more
NO_ROOM = "no_room"  # reason of a redirect: this receiver is short of blocks, another may not be


class Send(Enum):
    """The prefill side of one transfer."""

    OFFERED = "offered"
    WAITING = "waiting"  # the receiver is short of blocks; its grant comes later
    GRANTED = "granted"  # payloads may go
    COMMITTED = "committed"  # everything was posted, the first token with it
    DONE = "done"
    REFUSED = "refused"  # by this receiver, for good
    REDIRECTED = "redirected"  # by this receiver; the router may name another
    ABORTED = "aborted"


class SendEvent(Enum):
    """What can happen to a sender."""

    GRANT = "grant"
    WAIT = "wait"
    REFUSE = "refuse"
    REDIRECT = "redirect"
    WANT = "want"
    SLOTS = "slots"
    COMMIT = "commit"
    REVOKE = "revoke"
    RECEIVED = "received"
    ABORT = "abort"  # by either side, by a lost peer, or by a deadline


class Recv(Enum):
    """The decode side of one transfer."""

    EXPECTED = "expected"  # known from Submit, holds nothing
    OFFERED = "offered"  # not answered yet
    WAITING = "waiting"  # short of blocks
    GRANTED = "granted"  # blocks reserved, payloads arrive
    COMMITTED = "committed"  # the sender has posted all; some may still be on their way
    REVOKING = "revoking"  # blocks given back; what the sender had under way runs out
    READY = "ready"  # every block verified and published
    REFUSED = "refused"
    REDIRECTED = "redirected"
    DRAINING = "draining"  # aborted; lent slots still have receives posted
    ABORTED = "aborted"


class RecvEvent(Enum):
    """What can happen to a receiver."""

    OFFER = "offer"
    GRANT = "grant"
    WAIT = "wait"
    REFUSE = "refuse"
    REDIRECT = "redirect"
    WANT = "want"
    PAYLOAD = "payload"
    COMMIT = "commit"
    COMPLETE = "complete"
    REVOKE = "revoke"
    STOPPED = "stopped"  # the sender has seen the revoke: nothing older is on the wire
    ABORT = "abort"
    DRAIN = "drain"  # aborted while slots are lent
    DRAINED = "drained"


SENDER: Mapping[Send, Mapping[SendEvent, Send]] = {
    Send.OFFERED: {
        SendEvent.GRANT: Send.GRANTED,
        SendEvent.WAIT: Send.WAITING,
        SendEvent.REFUSE: Send.REFUSED,
        SendEvent.REDIRECT: Send.REDIRECTED,
        SendEvent.ABORT: Send.ABORTED,
    },
    Send.WAITING: {
        SendEvent.GRANT: Send.GRANTED,
        SendEvent.REFUSE: Send.REFUSED,
        SendEvent.REDIRECT: Send.REDIRECTED,
        SendEvent.ABORT: Send.ABORTED,
    },
    Send.GRANTED: {
        SendEvent.WANT: Send.GRANTED,
        SendEvent.SLOTS: Send.GRANTED,
        SendEvent.COMMIT: Send.COMMITTED,
        SendEvent.REVOKE: Send.WAITING,
        SendEvent.ABORT: Send.ABORTED,
    },
    Send.COMMITTED: {SendEvent.RECEIVED: Send.DONE, SendEvent.REVOKE: Send.WAITING, SendEvent.ABORT: Send.ABORTED},
    Send.DONE: {},
    Send.REFUSED: {},
    Send.REDIRECTED: {},
    Send.ABORTED: {},
}

RECEIVER: Mapping[Recv, Mapping[RecvEvent, Recv]] = {
    Recv.EXPECTED: {RecvEvent.OFFER: Recv.OFFERED, RecvEvent.ABORT: Recv.ABORTED},
    Recv.OFFERED: {
        RecvEvent.GRANT: Recv.GRANTED,
        RecvEvent.WAIT: Recv.WAITING,
        RecvEvent.REFUSE: Recv.REFUSED,
        RecvEvent.ABORT: Recv.ABORTED,
    },
    Recv.WAITING: {
        RecvEvent.GRANT: Recv.GRANTED,
        RecvEvent.REFUSE: Recv.REFUSED,
        RecvEvent.REDIRECT: Recv.REDIRECTED,
        RecvEvent.ABORT: Recv.ABORTED,
    },
    Recv.GRANTED: {
        RecvEvent.WANT: Recv.GRANTED,
        RecvEvent.PAYLOAD: Recv.GRANTED,
        RecvEvent.COMMIT: Recv.COMMITTED,
        RecvEvent.REVOKE: Recv.REVOKING,
        RecvEvent.ABORT: Recv.ABORTED,
        RecvEvent.DRAIN: Recv.DRAINING,
    },
    Recv.COMMITTED: {
        RecvEvent.PAYLOAD: Recv.COMMITTED,
        RecvEvent.COMPLETE: Recv.READY,
        RecvEvent.REVOKE: Recv.REVOKING,
        RecvEvent.ABORT: Recv.ABORTED,
        RecvEvent.DRAIN: Recv.DRAINING,
    },
    # The sender's words crossed the revoke: they are of the grant before, and count for nothing.
    Recv.REVOKING: {
        RecvEvent.WANT: Recv.REVOKING,
        RecvEvent.PAYLOAD: Recv.REVOKING,
        RecvEvent.COMMIT: Recv.REVOKING,
        RecvEvent.STOPPED: Recv.REVOKING,
        RecvEvent.DRAINED: Recv.WAITING,
        RecvEvent.ABORT: Recv.ABORTED,
        RecvEvent.DRAIN: Recv.DRAINING,
    },
    Recv.READY: {},
    Recv.REFUSED: {},
    Recv.REDIRECTED: {},
    Recv.DRAINING: {RecvEvent.PAYLOAD: Recv.DRAINING, RecvEvent.DRAINED: Recv.ABORTED},
    Recv.ABORTED: {},
}


def describe() -> str:
    """Both machines as Mermaid state diagrams."""
    lines = ["# The hand-off's state machines", "", "Printed from `kvtransfer/protocol.py`; do not edit.", ""]
    tables: tuple[tuple[str, Mapping[Enum, Mapping[Enum, Enum]]], ...] = (("Sender", SENDER), ("Receiver", RECEIVER))  # type: ignore[assignment]
    for title, table in tables:
        lines += [f"## {title}", "", "```mermaid", "stateDiagram-v2"]
        start = next(iter(table))
        lines.append(f"    [*] --> {start.value}")
        for state, following in table.items():
            lines += [f"    {state.value} --> {after.value}: {event.value}" for event, after in following.items()]
            if not following:
                lines.append(f"    {state.value} --> [*]")
        lines += ["```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(), end="")
