"""The transport alone: one shipment as numbered messages, a window of receives posted ahead, slots used again and again.

The receiver tells of each receive it has posted (as lending a slot does), and the sender never runs ahead of that. Where it also
tells the key of the slot, the message is made there; else it is sent.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvtransfer.transport import Link, slot_tag
from kvtransfer.ucx import UcxTransport

_POSTED = struct.Struct("<II")  # run, number of the message a receive is posted for; the slot's key follows


class Outbox(Protocol):
    """What is sent. Messages are numbered from 0."""

    num_messages: int
    num_slots: int  # messages on their way at once

    def message(self, number: int, slot: int) -> memoryview:
        """The bytes, made in send slot `slot` or lying where they are."""

    def write(self, number: int, room: memoryview) -> None:
        """Makes them in the receiver's slot."""


class Inbox(Protocol):
    """Where it goes."""

    num_messages: int
    num_slots: int

    def room(self, number: int, slot: int) -> memoryview:
        """Memory for one message; the slot's memory is free again."""

    def key(self, slot: int) -> bytes:
        """By which the sender may write there; empty where it shall send."""

    def arrived(self, number: int, slot: int) -> None:
        """The message is in its room."""


class Wire:
    """One end; one shipment at a time in each direction."""

    def __init__(self) -> None:
        self.transport = UcxTransport("lo")
        self.transport.start(self._on_control)
        self._link: Link | None = None
        self._posted: dict[int, dict[int, bytes]] = {}  # keys by run and number
        self._pump: Callable[[], None] = lambda: None

    def meet(self, address: bytes) -> None:
        self._link = self.transport.connect(address)

    def _on_control(self, frame: memoryview) -> None:
        run, number = _POSTED.unpack_from(frame)
        self._posted.setdefault(run, {})[number] = bytes(frame[_POSTED.size :])
        self._pump()

    async def send(self, run: int, outbox: Outbox) -> float:
        """Sends everything; returns the instant when it could begin."""
        link, done, free, num_sent, num_done, began = self._link, asyncio.Event(), deque(range(outbox.num_slots)), 0, 0, 0.0
        assert link is not None

        def pump() -> None:
            nonlocal num_sent, began
            posted = self._posted.get(run, {})
            if posted and not began:
                began = time.perf_counter()
            while free and num_sent in posted:
                slot = free.popleft()
                room = link.reach(posted[num_sent])
                if room is None:
                    message = outbox.message(num_sent, slot)
                else:
                    outbox.write(num_sent, room)
                    message = room[:0]
                link.send_payload(slot_tag(num_sent, run), message, lambda exc, slot=slot: sent(exc, slot))  # type: ignore[misc]
                num_sent += 1

        def sent(exc: Exception | None, slot: int) -> None:
            nonlocal num_done
            assert exc is None, exc
            num_done += 1
            free.append(slot)
            pump()
            if num_done == outbox.num_messages:
                done.set()

        self._pump = pump
        pump()
        await done.wait()
        del self._posted[run]
        return began

    async def receive(self, run: int, inbox: Inbox) -> float:
        """Receives everything; returns the instant when the last message was in its place."""
        link, done, num_posted, num_arrived, ended = self._link, asyncio.Event(), 0, 0, 0.0
        assert link is not None

        def post(slot: int) -> None:
            nonlocal num_posted
            number = num_posted
            num_posted += 1
            self.transport.receive(slot_tag(number, run), inbox.room(number, slot), lambda exc: arrived(exc, number, slot))
            link.send_control(_POSTED.pack(run, number) + inbox.key(slot))

        def arrived(exc: Exception | None, number: int, slot: int) -> None:
            nonlocal num_arrived, ended
            assert exc is None, exc
            inbox.arrived(number, slot)
            num_arrived += 1
            if num_posted < inbox.num_messages:
                post(slot)
            elif num_arrived == inbox.num_messages:
                ended = time.perf_counter()
                done.set()

        for slot in range(min(inbox.num_slots, inbox.num_messages)):
            post(slot)
        await done.wait()
        return ended
