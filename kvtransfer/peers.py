"""Other workers, as one worker's transfers see them: who they are, how to reach them, who is gone for good. io thread."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvtransfer.frames import control_frame, write_void
from kvtransfer.probe import PairMeter
from kvtransfer.sender import LentSlot
from kvtransfer.transport import Link, Transport, slot_tag
from splitfire.core.errors import Unavailable
from splitfire.core.limits import MAX_WORKERS
from splitfire.v1 import kv_pb2


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Another worker: who it is, and where its transport is reached."""

    worker_id: str
    incarnation: bytes
    address: bytes


class Peer:
    """The way to one other worker."""

    def __init__(self, address: PeerAddress, link: Link, incarnation: bytes) -> None:
        self.address = address
        self.link = link
        self.meter: PairMeter | None = None
        self._incarnation = incarnation  # of this worker, which every frame carries

    def send(self, message: kv_pb2.KvMessage) -> None:
        self.link.send_control(control_frame(self._incarnation, message))

    def void(self, slot: LentSlot) -> None:
        """Fills a slot lent to us with nothing, so that its receive completes."""
        frame = memoryview(bytearray(64))
        length = write_void(frame, self._incarnation)
        self.link.send_payload(slot_tag(slot.index, slot.generation), frame[:length], lambda _exc: None)


class Peers:
    """Everybody we were told about. One that went is not listened to, until a router says that it is there again."""

    def __init__(self, transport: Transport, incarnation: bytes) -> None:
        self._transport = transport
        self._incarnation = incarnation
        self._peers: dict[bytes, Peer] = {}
        self._gone: OrderedDict[bytes, None] = OrderedDict()

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
            peer = self._peers[address.incarnation] = Peer(address, self._transport.connect(address.address), self._incarnation)
        return peer

    def known(self, incarnation: bytes) -> Peer | None:
        return self._peers.get(incarnation)

    def is_gone(self, incarnation: bytes) -> bool:
        return incarnation in self._gone

    def remove(self, incarnation: bytes) -> Peer | None:
        self._gone[incarnation] = None
        while len(self._gone) > MAX_WORKERS:
            self._gone.popitem(last=False)
        return self._peers.pop(incarnation, None)
