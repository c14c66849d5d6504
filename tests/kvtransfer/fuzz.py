"""Fuzzing the KV wire: a peer that says and sends anything, beside peers that do not.

`frames` plays a hostile worker against a live agent, byte by byte and field by field; `receiver` and `sender` play it against
one machine, word by word. `python -m tests.kvtransfer.fuzz 60` (`make fuzz`) tries new inputs for a minute.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvtransfer import frames as wire
from kvtransfer.agent import AgentOptions, Handle, TransferAgent
from kvtransfer.expectation import Expectation
from kvtransfer.frames import DIGEST_OFF, DIGEST_SUM64, Payload, PayloadHeader, bind, slot_bytes_for, write_payload
from kvtransfer.peers import PeerAddress
from kvtransfer.protocol import Recv, Send
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring, RingOptions, RingSlot
from kvtransfer.sender import LentSlot, Outcome, Piece, Sender, Shipment
from kvtransfer.transport import Done, Link, OnControl, SlotMemory, slot_tag
from splitfire.core.layout import KvLayout
from splitfire.core.limits import MAX_CONTROL_BYTES
from splitfire.core.wire import layout_to_wire
from splitfire.v1 import fleet_pb2, kv_pb2
from tests.kvtransfer.fakes import FINGERPRINT, LAYOUT, FakeSink, FakeSource, content, sums_of

BATCH = 100  # examples between looks at the clock
SLOT_BYTES = slot_bytes_for(LAYOUT.block_bytes) * 2
NUM_TOKENS, NUM_BLOCKS = 70, 5
TOKEN = b"t" * 16
INCOMING, OUTGOING, BESIDE_IN, BESIDE_OUT, UNKNOWN = b"i" * 16, b"o" * 16, b"<" * 16, b">" * 16, b"?" * 16


# -- what may be said

u32 = st.sampled_from([0, 1, 2, 3, 5, 16, 70, 2**16, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
u64 = u32 | st.sampled_from([k * LAYOUT.block_bytes for k in range(1, 7)]) | st.integers(0, 2**64 - 1)
text = st.sampled_from(["", "no_room", "withdrawn", "x" * 1000])
slots = st.builds(
    lambda s: kv_pb2.Slots(slots=s), st.lists(st.builds(kv_pb2.Slot, index=u32, generation=u32, bytes=u32), max_size=6)
)
first_token = st.builds(kv_pb2.FirstToken, choice=u32, offset=u32, token_id=u32)
kv_format = st.sampled_from(
    [
        layout_to_wire(LAYOUT),
        layout_to_wire(replace(LAYOUT, dtype="bf16")),
        layout_to_wire(replace(LAYOUT, dtype="int8")),
        layout_to_wire(replace(LAYOUT, dtype="no such")),
        layout_to_wire(replace(LAYOUT, num_layers=0)),
        layout_to_wire(replace(LAYOUT, block_size=2**32 - 1)),
        fleet_pb2.KvFormat(),
    ]
)  # fmt: skip
bodies = {
    "offer": st.builds(
        kv_pb2.Offer,
        token=st.sampled_from([TOKEN, b"", b"x" * 16]),
        num_tokens=st.just(NUM_TOKENS) | u32,
        num_blocks=st.just(NUM_BLOCKS) | u32,
        kv_format=kv_format,
        traceparent=text,
    ),
    "grant": st.builds(
        kv_pb2.Grant,
        first_block=u32,
        kv_format=kv_format,
        slot_bytes=st.just(SLOT_BYTES) | u32,
        digest_algorithm=st.sampled_from([DIGEST_SUM64, DIGEST_OFF]) | u32,
    ),
    "wait": st.builds(kv_pb2.Wait, reason=text),
    "refuse": st.builds(kv_pb2.Refuse, reason=text, is_retryable=st.booleans()),
    "revoke": st.builds(kv_pb2.Revoke, reason=text),
    "want": st.integers(1, NUM_BLOCKS).map(lambda k: kv_pb2.Want(bytes=k * LAYOUT.block_bytes, num_slots=k))
    | st.builds(kv_pb2.Want, bytes=u64, num_slots=u32),
    "slots": slots,
    "commit": st.builds(kv_pb2.Commit, num_blocks=st.just(NUM_BLOCKS) | u32, first_tokens=st.lists(first_token, max_size=3)),
    "received": st.just(kv_pb2.Received()),
    "redirect": st.builds(kv_pb2.RedirectOffer, reason=text),
    "abort": st.builds(kv_pb2.Abort, reason=text),
    "stopped": st.just(kv_pb2.Stopped()),
    "ping": st.builds(kv_pb2.Ping, sequence=u64, num_payloads=u32, run=u32),
    "pong": st.builds(kv_pb2.Pong, sequence=u64, num_arrived=u32, slots=slots, run=u32),
}
said = st.one_of([st.tuples(st.just(kind), body) for kind, body in bodies.items()])


def message(transfer_id: bytes, kind: str, body: object) -> kv_pb2.KvMessage:
    return kv_pb2.KvMessage(transfer_id=transfer_id, **{kind: body})  # type: ignore[arg-type]


# -- what may happen to bytes


@dataclass(frozen=True)
class Damage:
    """One change to a frame: `how` at a place given in 1/65536 of its length."""

    how: str
    place: int
    data: bytes

    def to(self, frame: bytes, other: bytes) -> bytes:
        at = self.place * len(frame) >> 16
        if self.how == "flip" and frame:
            return frame[:at] + bytes([frame[at] ^ (1 << self.place % 8)]) + frame[at + 1 :]
        if self.how == "truncate":
            return frame[:at]
        if self.how == "insert":
            return frame[:at] + self.data + frame[at:]
        if self.how == "overwrite":
            return frame[:at] + self.data + frame[at + len(self.data) :]
        if self.how == "splice":  # the beginning of one, the end of another
            return frame[:at] + other[at:]
        return self.data


hows = st.sampled_from(["flip", "truncate", "insert", "overwrite", "splice", "replace"])
damage = st.builds(Damage, hows, st.integers(0, 2**16 - 1), st.binary(max_size=80))
no_damage: st.SearchStrategy[list[Damage]] = st.just([])
damages = no_damage | st.lists(damage, max_size=3)
no_change: st.SearchStrategy[list[tuple[str, int]]] = st.just([])
header_change = st.tuples(st.sampled_from([*PayloadHeader.__slots__]), u64)


def changed(header: PayloadHeader, field: str, value: int) -> PayloadHeader:
    """`header` with one field that fits its place on the wire, whatever it means."""
    if field == "fingerprint":
        return replace(header, fingerprint=value.to_bytes(8, "little"))
    if field == "transfer_id":
        return replace(header, transfer_id=(OUTGOING, BESIDE_IN, UNKNOWN)[value % 3])
    if field == "dtype":
        return replace(header, dtype=("bf16", "fp16", "fp32", "int8")[value % 4])
    small = {"cache_id": 8, "digest_algorithm": 8, "payload_bytes": 64}
    bits = small.get(field, 16 if field.startswith(("layer", "head")) else 32)
    return replace(header, **{field: value % (1 << bits)})  # type: ignore[arg-type]


# -- the world of `frames`


class Network:
    """Delivers one call at a time, in order. `escaped` is what an agent logged as a bug instead of raising it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: deque[Callable[[], None]] = deque()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.nodes: dict[bytes, Node] = {}
        self.escaped: list[BaseException | None] = []

    def deliver(self, most: int = 1 << 30) -> None:
        while self.calls and most:
            self.calls.popleft()()
            most -= 1

    def later(self, seconds: float, call: Callable[[], None]) -> Handle:
        timer = (self.now + seconds, call)
        self.timers.append(timer)
        return _Timer(self.timers, timer)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, call in due:
            call()
        self.deliver()

    def exception(self, _event: str, **_fields: object) -> None:
        self.escaped.append(sys.exc_info()[1])

    def info(self, _event: str, **_fields: object) -> None: ...


@dataclass
class _Timer:
    timers: list[tuple[float, Callable[[], None]]]
    timer: tuple[float, Callable[[], None]]

    def cancel(self) -> None:
        if self.timer in self.timers:
            self.timers.remove(self.timer)


class Node:
    """A transport. It keeps payloads that come before their receive is posted, as UCX does; `is_certain` tells whether it can
    take a receive back, which UCX cannot."""

    name, version = "fuzz", "1"

    def __init__(self, network: Network, address: bytes, is_certain: bool) -> None:
        self.network, self.address, self.is_certain = network, address, is_certain
        self.dropped: Counter[str] = Counter()
        self.on_control: OnControl | None = None
        self.posted: dict[int, tuple[memoryview, Done]] = {}
        self.early: dict[int, deque[tuple[bytes, Done]]] = {}
        network.nodes[address] = self

    def start(self, on_control: OnControl) -> None:
        self.on_control = on_control

    def allocate(self, num_bytes: int) -> SlotMemory:
        return SlotMemory(memoryview(bytearray(num_bytes)))

    def connect(self, address: bytes) -> Link:
        return _Link(self.network, self.network.nodes[address])

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        assert tag not in self.posted
        self.posted[tag] = (buffer, done)
        if self.early.get(tag):
            self.network.calls.append(partial(self.fill, tag, *self.early[tag].popleft()))

    def cancel(self, tag: int) -> bool:
        return self.is_certain and self.posted.pop(tag, None) is not None

    def close(self) -> None: ...

    def control(self, frame: bytes) -> None:
        if self.on_control is not None:
            self.on_control(memoryview(frame))

    def fill(self, tag: int, data: bytes, sent: Done) -> None:
        if tag not in self.posted:
            self.early.setdefault(tag, deque()).append((data, sent))
            return
        buffer, done = self.posted.pop(tag)
        is_too_long = len(data) > len(buffer)
        buffer[: min(len(data), len(buffer))] = data[: len(buffer)]
        done(OSError("truncated") if is_too_long else None)
        sent(None)


class _Link:
    def __init__(self, network: Network, target: Node) -> None:
        self._network, self._target = network, target

    def send_control(self, frame: bytes) -> None:
        self._network.calls.append(partial(self._target.control, frame))

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        self._network.calls.append(lambda: self._target.fill(tag, bytes(message), done))

    def reach(self, key: bytes) -> memoryview | None:
        return None

    def close(self) -> None: ...


class Sea(Node):
    """What the hostile worker receives: everything, and it is gone."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, b"sea", True)
        self.lent: list[kv_pb2.Slot] = []  # to it

    def control(self, frame: bytes) -> None:
        heard = wire.parse_control(wire.parse_frame(memoryview(frame)).body)
        self.lent += heard.slots.slots
        self.lent += heard.pong.slots.slots

    def fill(self, tag: int, data: bytes, sent: Done) -> None:
        sent(None)


class World:
    """An agent with four transfers: one from and one to an honest worker, one from and one to a hostile one."""

    def __init__(self, is_certain: bool) -> None:
        self.network = network = Network()
        self.sea = Sea(network)
        self.agent, self.honest = self._agent(b"agent", is_certain), self._agent(b"honest", is_certain)
        self.hostile = PeerAddress("hostile", b"h" * 16, self.sea.address)
        here, there = (PeerAddress("w", a.incarnation, a.transport.address) for a in (self.agent, self.honest))
        self.agent.meet(self.hostile)
        self.agent.measure(self.hostile, lambda *_found: None)
        self.ends = {
            INCOMING: (None, FakeSink(1)),
            OUTGOING: (FakeSource(2), None),
            BESIDE_IN: (FakeSource(3), FakeSink(3)),
            BESIDE_OUT: (FakeSource(4), FakeSink(4)),
        }
        self.receivers: list[Receiver] = []
        self._begin(INCOMING, None, (self.agent, self.hostile))
        self._begin(OUTGOING, (self.agent, self.hostile), None)
        self._begin(BESIDE_IN, (self.honest, here), (self.agent, there))
        self._begin(BESIDE_OUT, (self.agent, there), (self.honest, here))
        self.num_said = 0
        self.last_frame = b""

    def _agent(self, name: bytes, is_certain: bool) -> TransferAgent:
        options = AgentOptions(send_slots=2, receive_slots=3, slot_bytes=SLOT_BYTES)
        network = self.network
        node = Node(network, name, is_certain)
        agent = TransferAgent(node, name.ljust(16), FINGERPRINT, options, lambda: network.now, network.later)
        agent.start()
        return agent

    def _begin(
        self, transfer_id: bytes, sends: tuple[TransferAgent, PeerAddress] | None, gets: tuple[TransferAgent, PeerAddress] | None
    ) -> None:
        source, sink = self.ends[transfer_id]
        if gets is not None and sink is not None:
            expectation = Expectation(transfer_id, TOKEN, gets[1].incarnation, NUM_TOKENS, LAYOUT, FINGERPRINT[:8])
            self.receivers.append(gets[0].expect(expectation, gets[1], sink))
        if sends is not None and source is not None:
            sender = sends[0].offer(Shipment(transfer_id, TOKEN, NUM_TOKENS, LAYOUT), sends[1], source)
            sender.computed(NUM_TOKENS)
            sender.finish([kv_pb2.FirstToken(token_id=1)])

    def say(self, transfer_id: bytes, what: tuple[str, object], harm: list[Damage], is_body: bool) -> None:
        """A control frame of the hostile worker, damaged as a whole or in its body alone. A good one counts; after a gap in
        the numbers nothing would be looked at any more, so a damaged one does not."""
        number = self.num_said + 1
        self.num_said += not harm
        good = wire.control_frame(self.hostile.incarnation, 1, number, message(transfer_id, *what))
        frame = self._harmed(good, harm)
        if is_body:
            body = self._harmed(good[wire._FRAME.size :], harm)[:MAX_CONTROL_BYTES]
            header = wire._FRAME.pack(wire.MAGIC, wire.VERSION, wire.CONTROL, 0, len(body), self.hostile.incarnation, 1, number)
            frame = header + body
        self.last_frame = good
        self.agent._on_control(memoryview(frame))

    def send(self, which: int, block: int, changes: list[tuple[str, int]], harm: list[Damage]) -> None:
        """A payload of the hostile worker into a slot that was lent to it, or (when it has none) to nobody."""
        slot = self.sea.lent[which % len(self.sea.lent)] if self.sea.lent else kv_pb2.Slot(index=1000 + which, generation=1)
        num_tokens = min(16, NUM_TOKENS - 16 * block)
        header = PayloadHeader(
            FINGERPRINT[:8], INCOMING, slot.index, slot.generation, 0, "fp32", DIGEST_SUM64, 0, 2, 0, 2,
            block, block + 1, num_tokens, LAYOUT.block_bytes, LAYOUT.block_bytes,
        )  # fmt: skip
        data = memoryview(bytearray(content(1, block, LAYOUT.block_bytes)))
        buffer = bytearray(SLOT_BYTES)
        begin = wire.data_offset(1)
        buffer[begin : begin + len(data)] = data
        length = write_payload(memoryview(buffer), self.hostile.incarnation, header, bind(header, sums_of(data, 1)))
        for field, value in changes:
            header = changed(header, field, value)
        values = [getattr(header, name) for name in PayloadHeader.__slots__]
        values[5] = wire._DTYPES.index(header.dtype)
        wire._PAYLOAD.pack_into(buffer, wire._FRAME.size, *values)
        payload = self._harmed(bytes(buffer[:length]), harm)
        tag = slot_tag(slot.index, slot.generation)
        node = self.agent.transport
        assert isinstance(node, Node)
        node.fill(tag, payload, lambda _exc: None)

    def _harmed(self, frame: bytes, harm: list[Damage]) -> bytes:
        for one in harm:
            frame = one.to(frame, self.last_frame)
        return frame

    def finish(self) -> None:
        """Others never noticed; what the hostile worker left behind, time takes away."""
        self.network.deliver()
        for transfer_id in (BESIDE_IN, BESIDE_OUT):
            source, sink = self.ends[transfer_id]
            assert source is not None and sink is not None
            assert source.outcome is Outcome.RECEIVED, (source.outcome, source.reason, sink.end)
            sink.assert_right(NUM_BLOCKS)
        sink = self.ends[INCOMING][1]
        assert sink is not None
        right = {block: content(1, block, LAYOUT.block_bytes) for block in range(NUM_BLOCKS)}
        assert sink.written.items() <= right.items(), "nothing wrong was published"
        assert sink.end != "ready" or sink.written == right
        self._pass_time(50)
        if self.receivers[0].is_open:  # it promised nothing that did not come: the request's deadline is the router's
            assert self.receivers[0].state in (Recv.EXPECTED, Recv.GRANTED) and not self.receivers[0].lent
            self.receivers[0].close("request ended", is_retryable=False)
        self._pass_time(12)
        source = self.ends[OUTGOING][0]
        assert source is not None and source.outcome is not None and sink.end
        assert not sink.holds_blocks or sink.end == "ready"
        for agent in (self.agent, self.honest):
            assert agent.num_open == agent.num_held_slots == agent._incoming.num_parked == 0
        assert not self.network.escaped, self.network.escaped

    def _pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.network.wait(1.0)
            for agent in (self.agent, self.honest):
                agent.tick()
            self.network.deliver()


# -- three targets

Say = tuple[str, bytes, tuple[str, object], list[Damage], bool]
says = st.tuples(
    st.just("say"),
    st.sampled_from([INCOMING, INCOMING, OUTGOING, OUTGOING, BESIDE_IN, BESIDE_OUT, UNKNOWN, b""]),
    said,
    damages,
    st.booleans(),
)
sends = st.tuples(
    st.just("send"), st.integers(0, 5), st.integers(0, NUM_BLOCKS - 1), no_change | st.lists(header_change, max_size=2), damages
)
delivers = st.tuples(st.just("deliver"), st.integers(1, 20))
waits = st.tuples(st.just("wait"), st.sampled_from([0.02, 0.6, 2.5]))
RIGHT_OFFER = ("offer", kv_pb2.Offer(token=TOKEN, num_tokens=NUM_TOKENS, num_blocks=NUM_BLOCKS, kv_format=layout_to_wire(LAYOUT)))
RIGHT_WANT = ("want", kv_pb2.Want(bytes=LAYOUT.block_bytes * NUM_BLOCKS, num_slots=NUM_BLOCKS))
RIGHT_COMMIT = ("commit", kv_pb2.Commit(num_blocks=NUM_BLOCKS, first_tokens=[kv_pb2.FirstToken(token_id=1)]))
RIGHT_GRANT = ("grant", kv_pb2.Grant(kv_format=layout_to_wire(LAYOUT), slot_bytes=SLOT_BYTES, digest_algorithm=DIGEST_SUM64))
RIGHT_SLOTS = ("slots", kv_pb2.Slots(slots=[kv_pb2.Slot(index=i, generation=1) for i in range(3)]))
RIGHT_RECEIVED = ("received", kv_pb2.Received())
rights: st.SearchStrategy[Say] = st.sampled_from(
    [("say", INCOMING, what, [], False) for what in (RIGHT_OFFER, RIGHT_WANT, RIGHT_COMMIT)]
    + [("say", OUTGOING, what, [], False) for what in (RIGHT_GRANT, RIGHT_SLOTS, RIGHT_RECEIVED)]
)
# Most begin as a right hand-off does, or nothing past the first check would ever be reached.
openings: st.SearchStrategy[list[Any]] = st.sampled_from(
    [
        [],
        [("say", INCOMING, RIGHT_OFFER, [], False)],
        [("say", INCOMING, RIGHT_OFFER, [], False), ("say", OUTGOING, RIGHT_GRANT, [], False)],
        [("say", INCOMING, RIGHT_OFFER, [], False), ("say", INCOMING, RIGHT_WANT, [], False), ("deliver", 9)],
        [
            ("say", OUTGOING, RIGHT_GRANT, [], False),
            ("say", OUTGOING, RIGHT_SLOTS, [], False),
            ("say", INCOMING, RIGHT_OFFER, [], False),
        ],
    ]
)
good_sends = st.tuples(st.just("send"), st.integers(0, 5), st.integers(0, NUM_BLOCKS - 1), no_change, no_damage)
calm = st.lists(st.one_of(good_sends, delivers, rights), max_size=6)
acts = st.lists(st.one_of(says, sends, rights, delivers, waits), max_size=25)


@contextmanager
def bugs_are_caught(network: Network) -> Iterator[None]:
    """An agent survives its own bugs, and logs them: here they count."""
    with mock.patch("kvtransfer.incoming.log", network), mock.patch("kvtransfer.outgoing.log", network):
        yield


def play(is_certain: bool, opening: list[Any], then: list[Any], at_last: list[Any]) -> None:
    world = World(is_certain)
    with bugs_are_caught(world.network):
        for act, *arguments in [*opening, *then, *at_last]:
            if act == "deliver":
                world.network.deliver(*arguments)
            elif act == "wait":
                world.network.deliver()  # or others would wait for the network too long
                world.network.wait(*arguments)
            else:
                getattr(world, act)(*arguments)
        world.finish()


class HostileSender(RuleBasedStateMachine):
    """A receiver, and a sender that follows no protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = FakeSink(1)
        self.num_finished = 0
        self.patience = 0
        self.ring = Ring(RingOptions(4, SLOT_BYTES, 1), lambda size: SlotMemory(memoryview(bytearray(size))))
        self.segment = self.ring.segment(b"peer")
        expectation = Expectation(INCOMING, TOKEN, b"h" * 16, NUM_TOKENS, LAYOUT, FINGERPRINT[:8])
        self.receiver = Receiver(expectation, self.sink, self, SLOT_BYTES, lambda: 0.0)

    @initialize(patience=st.integers(0, 25))
    def begin(self, patience: int) -> None:
        self.patience = patience  # steps before it says what it should not: after that there is little left to happen

    # -- ReceiverPort

    def send(self, message: kv_pb2.KvMessage) -> None:
        assert not self.num_finished, "nothing is said after the end"

    def ask_room(self) -> None: ...

    def lend(self) -> None: ...

    def finished(self) -> None:
        self.num_finished += 1

    # -- what may happen

    @precondition(lambda self: not self.num_finished and self.patience <= 0)
    @rule(what=said)
    def hear(self, what: tuple[str, object]) -> None:
        self.receiver.on_message(message(INCOMING, *what))

    @precondition(lambda self: not self.num_finished)
    @rule(what=st.sampled_from([RIGHT_OFFER, RIGHT_WANT, RIGHT_COMMIT]))
    def hear_what_is_right(self, what: tuple[str, object]) -> None:
        self.hear(what)

    @precondition(lambda self: self.receiver.is_short)
    @rule(has_room=st.booleans())
    def answer(self, has_room: bool) -> None:
        self.sink.num_not_now = 0 if has_room else 1
        self.receiver.try_reserve()

    @precondition(lambda self: self.receiver.num_slots_wanted and self.segment.num_lent < self.segment.num_slots)
    @rule()
    def lend_slot(self) -> None:
        slot = self.segment.lend()
        assert slot is not None
        self.receiver.lend_now(slot)

    @precondition(lambda self: self.receiver.lent)
    @rule(
        which=st.integers(0, 3),
        block=st.integers(0, NUM_BLOCKS),
        changes=no_change | st.lists(header_change, max_size=1),
        is_void=st.booleans(),
    )
    def arrive(self, which: int, block: int, changes: list[tuple[str, int]], is_void: bool) -> None:
        slot = [*self.receiver.lent.values()][which % len(self.receiver.lent)]
        self.receiver.on_payload(slot, None if is_void else payload_for(slot, block, changes))
        self.segment.give_back(slot)

    @precondition(lambda self: self.receiver.state in (Recv.GRANTED, Recv.COMMITTED))
    @rule()
    def revoke(self) -> None:
        self.receiver.revoke("test")

    @precondition(lambda self: self.receiver.state is Recv.WAITING)
    @rule()
    def redirect(self) -> None:
        self.receiver.redirect("test")

    @precondition(lambda self: self.patience <= 0)
    @rule(tell_peer=st.booleans())
    def close(self, tell_peer: bool) -> None:
        if not self.num_finished:
            self.receiver.close("test", is_retryable=True, tell_peer=tell_peer)

    @rule()
    def wait(self) -> None: ...

    @invariant()
    def time_passes(self) -> None:
        self.patience -= 1

    @invariant()
    def blocks_are_held_from_grant_to_end(self) -> None:
        is_granted = self.receiver.state in (Recv.GRANTED, Recv.COMMITTED, Recv.READY)
        assert self.sink.holds_blocks is is_granted
        assert bool(self.sink.end) is (not self.receiver.is_open)

    @invariant()
    def nothing_wrong_is_published(self) -> None:
        assert self.sink.written == {b: content(1, b, LAYOUT.block_bytes) for b in self.sink.written}
        assert self.receiver.state is not Recv.READY or len(self.sink.written) == NUM_BLOCKS

    @invariant()
    def it_ends_once_and_with_its_slots_back(self) -> None:
        assert self.num_finished == (not self.receiver.is_open and not self.receiver.lent)

    def teardown(self) -> None:
        self.close(True)
        while self.receiver.lent:
            self.arrive(0, 0, [], True)
        assert self.num_finished == 1 and self.sink.end
        assert self.segment.num_lent == 0


def payload_for(slot: RingSlot, block: int, changes: list[tuple[str, int]]) -> Payload:
    """Block `block`; where its header was changed, the digest is of what it was before."""
    header = PayloadHeader(
        FINGERPRINT[:8], INCOMING, slot.index, slot.generation, 0, "fp32", DIGEST_SUM64, 0, 2, 0, 2,
        block, block + 1, max(0, min(16, NUM_TOKENS - 16 * block)), LAYOUT.block_bytes, LAYOUT.block_bytes,
    )  # fmt: skip
    data = memoryview(bytearray(content(1, block, LAYOUT.block_bytes)))
    digests = tuple(bind(header, sums_of(data, 1)))
    for field, value in changes:
        if field not in ("payload_bytes", "block_start", "block_end"):  # parse_payload lets none through that do not fit
            header = changed(header, field, value)
    return Payload(header, digests, data)


class HostileReceiver(RuleBasedStateMachine):
    """A sender, and a receiver that follows no protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[Outcome] = []
        self.num_lent = self.num_filled = 0
        self.num_tokens = self.patience = self.next_block = 0
        self.sender = Sender(Shipment(OUTGOING, TOKEN, NUM_TOKENS, LAYOUT), self, lambda: 0.0)
        self.sender.offer()

    @initialize(patience=st.integers(0, 12))
    def begin(self, patience: int) -> None:
        self.patience = patience

    # -- SenderPort

    def send(self, message: kv_pb2.KvMessage) -> None:
        assert not self.ends, "nothing is said after the end"

    def send_piece(self, slot: LentSlot, piece: Piece) -> None:
        assert not self.ends and self.sender.state is Send.GRANTED
        assert self.next_block == piece.start < piece.end <= LAYOUT.blocks_for(self.num_tokens), "in order, and computed"
        self.next_block = piece.end
        self.num_filled += 1

    def send_void(self, slot: LentSlot) -> None:
        self.num_filled += 1

    def blocks_per_payload(self, layout: KvLayout, receiver_slot_bytes: int) -> int:
        return wire.blocks_per_slot(min(SLOT_BYTES, receiver_slot_bytes), layout.block_bytes)

    def granted(self) -> None:
        self.next_block = self.sender.first_block

    def closed(self, outcome: Outcome, reason: str) -> None:
        self.ends.append(outcome)

    # -- what may happen

    @precondition(lambda self: self.sender.is_open and self.patience <= 0)
    @rule(what=said)
    def hear(self, what: tuple[str, object]) -> None:
        if what[0] == "slots":
            self.num_lent += len(what[1].slots)  # type: ignore[attr-defined]
        self.sender.on_message(message(OUTGOING, *what))

    @precondition(lambda self: self.sender.state in (Send.OFFERED, Send.WAITING))
    @rule(first_block=st.integers(0, NUM_BLOCKS))
    def hear_grant(self, first_block: int) -> None:
        grant = kv_pb2.Grant(
            first_block=first_block, kv_format=layout_to_wire(LAYOUT), slot_bytes=SLOT_BYTES, digest_algorithm=DIGEST_SUM64
        )
        self.hear(("grant", grant))

    @rule(num_tokens=st.integers(1, NUM_TOKENS))
    def compute(self, num_tokens: int) -> None:
        self.num_tokens = max(self.num_tokens, num_tokens)
        self.sender.computed(self.num_tokens)

    @rule()
    def finish(self) -> None:
        self.num_tokens = NUM_TOKENS
        self.sender.computed(NUM_TOKENS)
        self.sender.finish([kv_pb2.FirstToken(token_id=1)])

    @precondition(lambda self: self.sender.state in (Send.GRANTED, Send.COMMITTED))
    @rule()
    def hear_revoke(self) -> None:
        self.hear(("revoke", kv_pb2.Revoke()))

    @precondition(lambda self: self.sender.state is Send.GRANTED)
    @rule(count=st.integers(0, 4))
    def hear_slots(self, count: int) -> None:
        self.hear(("slots", kv_pb2.Slots(slots=[kv_pb2.Slot(index=i, generation=1) for i in range(count)])))

    @precondition(lambda self: self.patience <= 0)
    @rule(tell_peer=st.booleans())
    def abort(self, tell_peer: bool) -> None:
        if self.sender.is_open:
            self.sender.abort("test", tell_peer=tell_peer)

    @invariant()
    def time_passes(self) -> None:
        self.patience -= 1

    @invariant()
    def every_slot_that_was_lent_is_filled_once(self) -> None:
        assert self.num_filled == self.num_lent

    @invariant()
    def it_ends_once(self) -> None:
        assert len(self.ends) == (not self.sender.is_open)


def _settings() -> settings:
    return settings(
        max_examples=BATCH,
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )


def fuzz_frames(number: int) -> None:
    seed(number)(_settings()(given(st.booleans(), openings, calm, acts)(play)))()


def fuzz_receiver(number: int) -> None:
    run_state_machine_as_test(seed(number)(HostileSender), settings=_settings())


def fuzz_sender(number: int) -> None:
    run_state_machine_as_test(seed(number)(HostileReceiver), settings=_settings())


TARGETS: dict[str, Callable[[int], None]] = {"frames": fuzz_frames, "receiver": fuzz_receiver, "sender": fuzz_sender}


def fuzz(target: str, seconds: float, first_seed: int) -> int:
    """Batches of examples, each with the next seed, until the time is over; how many examples."""
    end, number = time.monotonic() + seconds, first_seed
    while time.monotonic() < end:
        TARGETS[target](number)
        number += 1
    return (number - first_seed) * BATCH


def main() -> None:
    for name in TARGETS:
        first = secrets.randbits(32)
        sys.stdout.write(f"{name}: {fuzz(name, float(sys.argv[1]) / len(TARGETS), first)} examples, seeds from {first}\n")


if __name__ == "__main__":
    main()
