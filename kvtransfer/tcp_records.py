"""What the tcp transport does with the bytes of its accepted connections: posted receives, and where each byte belongs.

Sans-IO, io thread. A connection's parser says into which memory the next bytes are to be read (`room`) and is told how
many came (`took`), so payloads go straight into the slots that were posted for them.

A receive completes at most once, and only when one connection has written a whole message into it. Until then it stays
posted, whatever became of the connections that began to fill it: what they left there is overwritten by the next message
with its tag, or never looked at. Slots are lent to a peer after their receives are posted, so a payload that finds no
receive is of a lending that is over; it is read past, never stored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

import structlog

from kvtransfer.frames import FrameError
from kvtransfer.tcp_wire import (
    CONTROL,
    HEADER_BYTES,
    PREFACE_BYTES,
    RecordHeader,
    check_preface,
    parse_record_header,
)
from kvtransfer.transport import Done, OnControl

log = structlog.get_logger("worker")
READ_AHEAD_BYTES = 4096
SCRATCH_BYTES = 256 * 1024  # what nobody waits for is read into this, all connections into the same


@dataclass(slots=True, eq=False)
class PostedReceive:
    """`filler` is whoever writes to the buffer; a newer message with the tag takes it over.

    Of two, the newer is the one to have: its sender only repeats itself when its first connection broke, which may be
    seen here a moment later.
    """

    tag: int
    buffer: memoryview
    done: Done
    filler: RecordParser | None = None


class Inbox:
    """Everything that may arrive at one transport."""

    def __init__(self, instance: bytes) -> None:
        self.instance = instance
        self.dropped: Counter[str] = Counter()  # connections and payloads that were not taken, by reason
        self.on_control: OnControl | None = None
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._posted: dict[int, PostedReceive] = {}
        self._longest = 0  # of all buffers so far: nothing longer can be meant for us

    def post(self, tag: int, buffer: memoryview, done: Done) -> None:
        assert tag not in self._posted, f"a second receive with tag {tag:#x}"
        self._posted[tag] = PostedReceive(tag, buffer, done)
        self._longest = max(self._longest, len(buffer))

    def unpost(self, tag: int) -> bool:
        """Takes a receive back; whoever fills it reads the rest past it."""
        receive = self._posted.pop(tag, None)
        if receive is not None:
            receive.filler = None
        return receive is not None

    def claim(self, header: RecordHeader, filler: RecordParser) -> PostedReceive | None:
        """The receive this payload is for, None when it is to be read past."""
        receive = self._posted.get(header.tag)
        most = len(receive.buffer) if receive is not None else self._longest
        if header.length > most:
            raise FrameError("too_long", f"{header.length} bytes, accepted: at most {most}")
        if receive is None:
            self.dropped["unexpected_payload"] += 1
        else:
            receive.filler = filler
        return receive

    def complete(self, receive: PostedReceive) -> None:
        del self._posted[receive.tag]
        complete(receive.done, None)

    def deliver(self, frame: memoryview) -> None:
        if self.on_control is None:
            return
        try:
            self.on_control(frame)
        except Exception:  # a bug in what one frame asks for must not cost the others
            log.exception("control frame failed")

    def close(self) -> None:
        self._posted.clear()
        self.on_control = None


def complete(done: Done, exc: Exception | None) -> None:
    try:
        done(exc)
    except Exception:  # one transfer's bug must not cost the others their completions
        log.exception("completion failed")


class _Part(Enum):
    """What the next bytes of a connection are."""

    PREFACE = auto()
    HEADER = auto()
    CONTROL = auto()
    PAYLOAD = auto()


class RecordParser:
    """Tells the bytes of one connection apart. Raises FrameError on the first wrong one; it is of no use after that.

    Where a header may come, a little more is read with it, so that a small frame takes one call to the kernel and not
    three. Of a long body only that little is ever copied.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._ahead = memoryview(bytearray(READ_AHEAD_BYTES))
        self._num_ahead = 0  # bytes in it that belong to no part yet
        self._part = _Part.PREFACE
        self._receive: PostedReceive | None = None  # of the payload being read, None when it is read past
        self._body = self._ahead[:0]
        self._body_bytes = 0
        self._num_taken = 0  # of the body

    @property
    def is_greeted(self) -> bool:
        """The preface was right."""
        return self._part is not _Part.PREFACE

    @property
    def is_between_records(self) -> bool:
        """A connection that ends here ends well."""
        return self._part is _Part.HEADER and not self._num_ahead

    @property
    def room(self) -> memoryview:
        """Where the next bytes are to be read, never empty. Valid until `took`."""
        if self._part is _Part.PREFACE:  # alone: no record is looked at before the transport has taken the connection
            return self._ahead[self._num_ahead : PREFACE_BYTES]
        if self._part is _Part.HEADER:
            return self._ahead[self._num_ahead :]
        if self._is_read_past:
            return self._inbox.scratch[: self._body_bytes - self._num_taken]
        return self._body[self._num_taken :]

    def took(self, num_bytes: int) -> None:
        """`num_bytes` were written to the beginning of `room`."""
        if self._part is _Part.PREFACE:
            self._num_ahead += num_bytes
            check_preface(self._ahead[: self._num_ahead], self._inbox.instance)
            if self._num_ahead == PREFACE_BYTES:
                self._num_ahead = 0
                self._part = _Part.HEADER
        elif self._part is _Part.HEADER:
            self._num_ahead += num_bytes
            self._take_ahead()
        else:
            self._took_of_body(num_bytes)

    @property
    def _is_read_past(self) -> bool:
        return self._part is _Part.PAYLOAD and (self._receive is None or self._receive.filler is not self)

    def _take_ahead(self) -> None:
        """Every record that begins in what was read ahead; what is left is the beginning of a header, or nothing."""
        data = self._ahead[: self._num_ahead]
        while self._part is _Part.HEADER and len(data) >= HEADER_BYTES:
            self._begin_body(parse_record_header(data[:HEADER_BYTES]))
            begun = data[HEADER_BYTES : HEADER_BYTES + self._body_bytes]
            data = data[HEADER_BYTES + len(begun) :]
            if not self._is_read_past:
                self._body[: len(begun)] = begun
            self._took_of_body(len(begun))
        self._ahead[: len(data)] = bytes(data)
        self._num_ahead = len(data)

    def _begin_body(self, header: RecordHeader) -> None:
        self._body_bytes, self._num_taken = header.length, 0
        if header.kind == CONTROL:
            self._part, self._body = _Part.CONTROL, memoryview(bytearray(header.length))
            return
        self._receive = self._inbox.claim(header, self)
        self._part = _Part.PAYLOAD
        if self._receive is not None:
            self._body = self._receive.buffer[: header.length]

    def _took_of_body(self, num_bytes: int) -> None:
        self._num_taken += num_bytes
        if self._num_taken < self._body_bytes:
            return
        part, body, receive, is_read_past = self._part, self._body, self._receive, self._is_read_past
        self._part, self._body, self._receive = _Part.HEADER, self._ahead[:0], None
        if part is _Part.CONTROL:
            self._inbox.deliver(body)
        elif receive is not None and not is_read_past:
            self._inbox.complete(receive)
