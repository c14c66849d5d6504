"""Other workers, as one worker's transfers see them: who they are, how to reach them, who is gone for good. io thread."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from kvtransfer.frames import control_frame, write_void
from kvtransfer.probe import PairMeter
from kvtransfer.sender import LentSlot
from kvtransfer.transport import Link, Transport, slot_tag
from splitfire.core.errors import Unavailable
from splitfire.core.limits import MAX_WORKERS
from splitfire.v1 import kv_pb2

MAX_SEQUENCE = (1 << 32) - 1  # of the frames of one link


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Another worker: who it is, and where its transport is reached."""

    worker_id: str
    incarnation: bytes
    address: bytes


class Peer:
    """The way to one other worker."""

    def __init__(self, address: PeerAddress, link: Link, incarnation: bytes, link_numbers: Iterator[int]) -> None:
        self.address = address
        self.link = link
        self.meter: PairMeter | None = None
        self._incarnation = incarnation  # of this worker, which every frame carries
        self._link_numbers = link_numbers  # of all links of this worker
        self._link_number = next(link_numbers)
        self._num_sent = 0

    def send(self, message: kv_pb2.KvMessage) -> None:
        if self._num_sent == MAX_SEQUENCE:  # to the other side it is a new link
            self._link_number, self._num_sent = next(self._link_numbers), 0
        self._num_sent += 1
        self.link.send_control(control_frame(self._incarnation, self._link_number, self._num_sent, message))

    def void(self, slot: LentSlot) -> None:
        """Fills a slot lent to us with nothing, so that its receive completes."""
        frame = memoryview(bytearray(64))
        length = write_void(frame, self._incarnation)
        self.link.send_payload(slot_tag(slot.index, slot.generation), frame[:length], lambda _exc: None)


class Heard(Enum):
    """What the numbers of a control frame say about those before it."""

    IN_ORDER = "in order"
    REPEATED = "repeated"  # or of a link that was given up
    AFTER_A_GAP = "after a gap"


class Peers:
    """Everybody we were told about. One that went is not listened to, until a router says that it is there again."""

    def __init__(self, transport: Transport, incarnation: bytes) -> None:
        self._transport = transport
        self._incarnation = incarnation
        self._peers: dict[bytes, Peer] = {}
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        self._last: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # link and sequence of the last frame
        self._link_numbers = itertools.count(1)

    def introduce(self, address: PeerAddress) -> Peer:
        """Whatever was heard before, the peer is there."""
        self._gone.pop(address.incarnation, None)
        return self.get(address)

    def get(self, address: PeerAddress) -> Peer:
        """The peer at `address`, connected on first use. Unavailable when it is gone or cannot be connected to."""
        if address.incarnation in self._gone:
            raise Unavailable(f"{address.worker_id} is gone", reason="handoff_peer_gone")
        peer = self._peers.get(address.incarnation)
        if peer is None:
            link = self._transport.connect(address.address)
            peer = self._peers[address.incarnation] = Peer(address, link, self._incarnation, self._link_numbers)
        return peer

    def hear(self, incarnation: bytes, link: int, sequence: int) -> Heard:
        """Takes note of a control frame. Links of one sender count up; the newest counts."""
        last = self._last.get(incarnation)
        if last is not None and (link, sequence) <= last:
            return Heard.REPEATED
        self._last[incarnation] = (link, sequence)
        self._last.move_to_end(incarnation)
        while len(self._last) > MAX_WORKERS:
            self._last.popitem(last=False)
        if last is None:  # never heard of, or too long ago to remember
            return Heard.IN_ORDER
        follows = sequence == 1 if link > last[0] else sequence == last[1] + 1
        return Heard.IN_ORDER if follows else Heard.AFTER_A_GAP

    def known(self, incarnation: bytes) -> Peer | None:
        return self._peers.get(incarnation)

    def is_gone(self, incarnation: bytes) -> bool:
        return incarnation in self._gone

    def remove(self, incarnation: bytes) -> Peer | None:
        self._gone[incarnation] = None
        while len(self._gone) > MAX_WORKERS:
            self._gone.popitem(last=False)
        return self._peers.pop(incarnation, None)
