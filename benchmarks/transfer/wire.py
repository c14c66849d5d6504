"""The transport alone: one shipment as numbered messages, a window of receives posted ahead, slots used again and again.

The receiver tells how many receives it has posted (as lending a slot does), and the sender never runs ahead of that.
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

_POSTED = struct.Struct("<II")  # run, receives posted so far in it


class Outbox(Protocol):
    """What is sent. Messages are numbered from 0."""

    num_messages: int
    num_slots: int  # messages on their way at once

    def message(self, number: int, slot: int) -> memoryview:
        """The bytes, made in send slot `slot` or lying where they are."""


class Inbox(Protocol):
    """Where it goes."""

    num_messages: int
    num_slots: int

    def room(self, number: int, slot: int) -> memoryview:
        """Memory for one message; the slot's memory is free again."""

    def arrived(self, number: int, slot: int) -> None:
        """The message is in its room."""


class Wire:
    """One end; one shipment at a time in each direction."""

    def __init__(self) -> None:
        self.transport = UcxTransport("lo")
        self.transport.start(self._on_control)
        self._link: Link | None = None
        self._posted: dict[int, int] = {}  # by run
        self._pump: Callable[[], None] = lambda: None

    def meet(self, address: bytes) -> None:
        self._link = self.transport.connect(address)

    def _on_control(self, frame: memoryview) -> None:
        run, posted = _POSTED.unpack(frame)
        self._posted[run] = posted
        self._pump()

    async def send(self, run: int, outbox: Outbox) -> float:
        """Sends everything; returns the instant when it could begin."""
        link, done, free, num_sent, num_done, began = self._link, asyncio.Event(), deque(range(outbox.num_slots)), 0, 0, 0.0
        assert link is not None

        def pump() -> None:
            nonlocal num_sent, began
            may_send = min(self._posted.get(run, 0), outbox.num_messages)
            if may_send and not began:
                began = time.perf_counter()
            while free and num_sent < may_send:
                slot = free.popleft()
                message = outbox.message(num_sent, slot)
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

        def tell() -> None:
            link.send_control(_POSTED.pack(run, num_posted))

        def arrived(exc: Exception | None, number: int, slot: int) -> None:
            nonlocal num_arrived, ended
            assert exc is None, exc
            inbox.arrived(number, slot)
            num_arrived += 1
            if num_posted < inbox.num_messages:
                post(slot)
                tell()
            elif num_arrived == inbox.num_messages:
                ended = time.perf_counter()
                done.set()

        for slot in range(min(inbox.num_slots, inbox.num_messages)):
            post(slot)
        tell()
        await done.wait()
        return ended
