"""Two workers and a router in a box: real agents, on a network whose every delivery is somebody's choice.

The network promises what UCX promises and no more: control frames of one link arrive in order; payloads arrive in any order
and overtake control; the memory of a send is read when it arrives; nobody says that a peer died; a posted receive cannot be
taken back. `World.enabled` lists what may happen next and `World.apply` lets it happen; a world is a function of the events
applied to it, so a path is a proof or a counterexample. Invariants are checked while events run: a violation raises.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.expectation import Expectation, Room
from kvtransfer.frames import _FRAME, slot_bytes_for
from kvtransfer.peers import PeerAddress
from kvtransfer.protocol import RECEIVER, Recv
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Outcome, Sender, Shipment
from kvtransfer.transport import Done, Link, OnControl, SlotMemory
from splitfire.core.layout import KvLayout
from splitfire.v1 import kv_pb2

LAYOUT = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=4, block_size=2)  # 64 bytes a block
FINGERPRINT = b"F" * 32
_NUMBERS_AT = _FRAME.size - 12  # of link and sequence in a frame
JUMP_S = 40.0  # longer than every deadline
P, D = "P", "D"


class Event(NamedTuple):
    """Something that may happen. `at` says where or to whom, as the kind wants it."""

    kind: str
    at: int | str = ""


@dataclass(frozen=True)
class Scenario:
    """What there is, and how many faults of each kind may happen on one path."""

    requests: int = 1
    blocks: int = 2  # of each request
    chunks: int = 1  # each request is computed in
    slots: int = 2  # of a segment
    pool: int = 4  # blocks at decode
    aborts: int = 0  # by either side, at any time
    revokes: int = 0
    crashes: int = 0  # of prefill; it starts again as a new incarnation
    late: int = 0  # requests that come after that, while what the dead one sent may still arrive
    jumps: int = 0  # of the clock, past every deadline
    losses: int = 0  # of one control frame. After a loss or a jump it may be the router who tells the other end of a failure
    repeats: int = 0  # of one control frame
    in_place: bool = False  # prefill writes into the slots where they lie


def content(request: int, block: int) -> bytes:
    """What a block of a request holds: a function of both, so that any mix-up shows."""
    return struct.pack("<II", request + 1, block + 1) * (LAYOUT.block_bytes // 8)


def _multiplier(i: int) -> int:
    """kv.proto, in plain integers."""
    mask = (1 << 64) - 1
    x = (i + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) | 1


MULTIPLIERS = [_multiplier(i) for i in range(LAYOUT.block_bytes // 8)]


def block_sums(blocks: memoryview, num_blocks: int) -> list[int]:
    size = len(blocks) // num_blocks
    each = (struct.unpack_from(f"<{size // 8}Q", blocks, i * size) for i in range(num_blocks))
    return [sum(w * m for w, m in zip(words, MULTIPLIERS, strict=True)) & (1 << 64) - 1 for words in each]


class Violation(BaseException):
    """An invariant that does not hold, named by its promise. No boundary of failure may swallow it."""


def require(condition: object, promise: str) -> None:
    if not condition:
        raise Violation(promise)


# -- the network


@dataclass
class _Payload:
    """A message to a posted receive. `message` is the sender's memory, read on arrival, or the slot itself, filled in place."""

    source: str
    target: str
    tag: int
    message: memoryview
    sent: Done
    has_arrived: bool = False


@dataclass
class Net:
    """What is on its way."""

    nodes: dict[str, ModelTransport] = field(default_factory=dict)
    control: dict[tuple[str, str], deque[bytes]] = field(default_factory=dict)
    payloads: dict[int, _Payload] = field(default_factory=dict)
    num_payloads: int = 0
    slots: dict[bytes, tuple[str, memoryview]] | None = None  # by key: whose, and where; None when they cannot be reached


class ModelTransport:
    """One worker's end."""

    name = "model"
    version = "1"

    def __init__(self, net: Net, node: str) -> None:
        self.address = node.encode()
        self.dropped: Counter[str] = Counter()
        self.node = node
        self.posted: dict[int, tuple[memoryview, Done]] = {}
        self.on_control: OnControl | None = None
        self._net = net
        net.nodes[node] = self

    def start(self, on_control: OnControl) -> None:
        self.on_control = on_control

    def allocate(self, num_bytes: int) -> SlotMemory:
        buffer = memoryview(bytearray(num_bytes))
        if self._net.slots is None:
            return SlotMemory(buffer)
        key = f"{self.node}{len(self._net.slots)}".encode()
        self._net.slots[key] = (self.node, buffer)
        return SlotMemory(buffer, key)

    def connect(self, address: bytes) -> Link:
        return _ModelLink(self._net, self.node, address.decode())

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        """A buffer that a receive is posted in belongs to the network: K3."""
        require(tag not in self.posted, "P1: one tag was posted twice")
        require(all(other.obj is not buffer.obj for other, _ in self.posted.values()), "P1: a slot was lent twice")
        self.posted[tag] = (buffer, done)

    def cancel(self, tag: int) -> bool:
        return False

    def close(self) -> None: ...


class _ModelLink:
    def __init__(self, net: Net, source: str, target: str) -> None:
        self._net = net
        self._ends = (source, target)
        self._reached: memoryview | None = None

    def send_control(self, frame: bytes) -> None:
        self._net.control.setdefault(self._ends, deque()).append(frame)

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        net, message = self._net, message or self._reached or message
        used = [p for p in net.payloads.values() if p.message.obj is message.obj and not p.has_arrived]
        require(not used, "P1: a send slot was used again before its send was over")
        net.payloads[net.num_payloads] = _Payload(*self._ends, tag, message, done)
        net.num_payloads += 1

    def reach(self, key: bytes) -> memoryview | None:
        """Who asks writes: it has to be lent to him."""
        if not key or self._net.slots is None:
            return None
        node, self._reached = self._net.slots[key]
        posted = self._net.nodes[node].posted.values()
        require(any(buffer.obj is self._reached.obj for buffer, _ in posted), "P1: a slot was written that was not lent")
        return self._reached

    def close(self) -> None: ...


# -- the two ends


class Pool:
    """Decode's blocks. Invariant: each is free, or lent to one sink."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks))
        self.owner: dict[int, ModelSink] = {}
        self.bytes: dict[int, bytes] = {}
        self.published: dict[int, bytes] = {}  # what others may see, as it was then

    def lend(self, sink: ModelSink, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        lent, self.free = self.free[:count], self.free[count:]
        for block in lent:
            require(block not in self.owner, "P4: a block was lent twice")
            self.owner[block] = sink
        return lent

    def give_back(self, sink: ModelSink, blocks: Sequence[int]) -> None:
        for block in blocks:
            require(self.owner.get(block) is sink, "P4: a block was freed twice, or by somebody else")
            del self.owner[block]
            self.published.pop(block, None)
            self.free.append(block)

    def check(self) -> None:
        require(sorted([*self.free, *self.owner]) == list(range(self.num_blocks)), "P4: a block is lost")


class ModelSource:
    """The prompt of one attempt at prefill."""

    def __init__(self, request: int) -> None:
        self.request = request
        self.num_computed = 0
        self.outcome: Outcome | None = None

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        require(self.outcome is None, "P1: blocks were read after they were given back")
        require(first_block + num_blocks <= self.num_computed, "P3: blocks were sent before they were computed")
        size = LAYOUT.block_bytes
        for i in range(num_blocks):
            payload[i * size : (i + 1) * size] = content(self.request, first_block + i)
        return block_sums(payload, num_blocks)

    def granted(self) -> None: ...

    def closed(self, outcome: Outcome, reason: str) -> None:
        require(self.outcome is None, "P2: a transfer ended twice at prefill")
        self.outcome = outcome


class ModelSink:
    """One attempt at decode."""

    def __init__(self, world: World, request: int) -> None:
        self.request = request
        self.blocks: list[int] = []
        self.end = ""
        self._world = world
        self._published: set[int] = set()

    def reserve(self) -> int | Room:
        require(not self.end and not self.blocks, "P4: blocks were reserved twice")
        lent = self._world.pool.lend(self, self._world.scenario.blocks)
        if lent is None:
            return Room.NOT_NOW
        self.blocks = lent
        return 0

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        require(not self.end and self.blocks, "P1: KV was written into blocks that were given back")
        size = LAYOUT.block_bytes
        for i in range(num_blocks):
            block = self.blocks[first_block + i]
            require(block not in self._world.pool.published, "P1: a block that others may see was written")
            self._world.pool.bytes[block] = bytes(blocks[i * size : (i + 1) * size])
        return block_sums(blocks, num_blocks)

    def publish(self, first_block: int, num_blocks: int) -> None:
        require(not self.end and self.blocks, "P1: blocks were published that were given back")
        for logical in range(first_block, first_block + num_blocks):
            block, pool = self.blocks[logical], self._world.pool
            require(pool.bytes.get(block) == content(self.request, logical), "P3: wrong KV was published")
            pool.published[block] = pool.bytes[block]
            self._published.add(logical)

    def revoked(self) -> None:
        require(not self.end and self.blocks, "P4: blocks were revoked that were not lent")
        self._give_back()

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        require(not self.end, "P2: a transfer ended twice at decode")
        self.end = "ready"
        wanted = set(range(self._world.scenario.blocks))
        require(self._published == wanted, "P3: the sequence joins before all its KV is here")
        require(first_tokens and first_tokens[0].token_id == self.request, "P3: another request's first token")
        require(not self._world.is_cancelled(self), "P10: a fenced attempt joins")
        self._give_back()  # it generated, and ended

    def closed(self, reason: str, is_retryable: bool) -> None:
        require(not self.end, "P2: a transfer ended twice at decode")
        self.end = reason
        self._give_back()

    def _give_back(self) -> None:
        blocks, self.blocks = self.blocks, []
        self._published.clear()
        self._world.pool.give_back(self, blocks)


# -- the world


@dataclass
class Attempt:
    """One try of one request, as the router sees it."""

    request: int
    transfer_id: bytes
    prefill: str  # node
    source: ModelSource
    sink: ModelSink
    sender: Sender | None = None
    receiver: Receiver | None = None
    num_chunks: int = 0  # computed
    is_cancelled: bool = False  # at decode, by the router

    @property
    def has_failed(self) -> bool:
        """Prefill has told the router so."""
        return self.source.outcome not in (None, Outcome.RECEIVED)


class _NoTimer:
    def cancel(self) -> None: ...


class World:
    """See above. Ticks are events here, so no agent has a timer."""

    def __init__(self, scenario: Scenario, make_agent: Callable[..., TransferAgent] = TransferAgent) -> None:
        self.scenario = scenario
        self.net = Net(slots={} if scenario.in_place else None)
        self.pool = Pool(scenario.pool)
        self.now = 0.0
        self.left = {
            "abort": scenario.aborts, "revoke": scenario.revokes, "crash": scenario.crashes,
            "jump": scenario.jumps, "lose": scenario.losses, "repeat": scenario.repeats,
        }  # fmt: skip
        self.agents: dict[str, TransferAgent] = {}
        self.dead: list[str] = []  # decode has not been told of these
        self.attempts: list[Attempt] = []
        self._make_agent = make_agent
        self._prefill = P
        self._start(P)
        self._start(D)
        for request in range(scenario.requests):
            self._submit(request)

    # -- what may happen

    def enabled(self) -> Iterator[Event]:
        """Without faults first; when only faults are left the world is quiet."""
        for i, attempt in enumerate(self.attempts):
            alive = attempt.prefill in self.agents
            if attempt.sender is None and alive and attempt.source.outcome is None:
                yield Event("offer", i)
            if attempt.receiver is None and not attempt.is_cancelled and attempt.prefill not in self.gone:
                yield Event("expect", i)
            if attempt.sender is not None and alive and attempt.sender.is_open and attempt.num_chunks < self.scenario.chunks:
                yield Event("compute", i)
        for ends, frames in sorted(self.net.control.items()):
            if frames and ends[1] in self.agents:
                yield Event("control", "".join(ends))
        for number, payload in self.net.payloads.items():
            target = self.net.nodes[payload.target]
            if not payload.has_arrived and payload.target in self.agents and payload.tag in target.posted:
                yield Event("payload", number)
            if payload.has_arrived and payload.source in self.agents:
                yield Event("sent", number)
        for i, attempt in enumerate(self.attempts):
            if (
                (self.scenario.losses or self.scenario.jumps)
                and attempt.has_failed
                and attempt.receiver is not None
                and not attempt.sink.end
            ):
                yield Event("tell", i)
        for node in self.dead:
            yield Event("gone", node)
        if any(a.receiver is not None and a.receiver.is_short for a in self.attempts) and self._has_room:
            yield Event("tick", D)

    def faults(self) -> Iterator[Event]:
        left = self.left
        for i, attempt in enumerate(self.attempts):
            if left["abort"] and attempt.sender is not None and attempt.sender.is_open and attempt.prefill in self.agents:
                yield Event("abort", i)
            if left["abort"] and attempt.receiver is not None and attempt.receiver.is_open:
                yield Event("cancel", i)
            if left["revoke"] and attempt.receiver is not None and attempt.receiver.state in (Recv.GRANTED, Recv.COMMITTED):
                yield Event("revoke", i)
        if left["crash"] and self._prefill in self.agents:
            yield Event("crash", self._prefill)
        if left["jump"]:
            yield Event("jump", P)
            yield Event("jump", D)
        for ends, frames in sorted(self.net.control.items()):
            if frames and left["lose"]:
                yield Event("lose", "".join(ends))
            if frames and left["repeat"]:
                yield Event("repeat", "".join(ends))

    @property
    def gone(self) -> set[str]:
        return {node for node in self.net.nodes if node != D and node not in self.agents and node not in self.dead}

    def apply(self, event: Event) -> None:
        """Lets it happen, then checks what must always hold."""
        if event.kind in self.left:
            self.left[event.kind] -= 1
        elif event.kind == "cancel":
            self.left["abort"] -= 1
        getattr(self, f"_on_{event.kind}")(event.at)
        self.check()

    def check(self) -> None:
        """P4 for blocks and slots, at every moment."""
        self.pool.check()
        for attempt in self.attempts:
            receiver = attempt.receiver
            if receiver is not None and RECEIVER[receiver.state] and receiver.state not in (Recv.GRANTED, Recv.COMMITTED):
                require(not attempt.sink.blocks, "P4: blocks are held without a grant")
            if attempt.sink.end == "ready" and attempt.sender is not None:
                done = attempt.source.outcome in (None, Outcome.RECEIVED, Outcome.ABORTED)
                require(done or self.left != self._all_left(), "P2: received at decode, failed at prefill without a fault")

    def settle(self) -> None:
        """No more faults, time passes: everything must come to its end, and nothing may be held (P5)."""
        for _ in range(6):
            while (event := next(self.enabled(), None)) is not None:
                self.apply(event)
            for node in (P, D) if self._prefill == P else (self._prefill, D):
                self._on_jump(node)
        for attempt in self.attempts:
            require(
                attempt.source.outcome is not None or attempt.prefill not in self.agents, "P7: a transfer never ends at prefill"
            )
            require(attempt.sink.end or attempt.receiver is None, "P7: a transfer never ends at decode")
        require(len(self.pool.free) == self.pool.num_blocks, "P5: blocks are held when all is over")
        for node, agent in self.agents.items():
            require(agent.num_open == 0, f"P5: {node} has transfers when all is over")
            require(agent.num_held_slots == 0, f"P5: {node} has lent slots when all is over")
            is_faultless = not (self.scenario.crashes or self.scenario.jumps or self.scenario.losses)
            require(agent.receive_ring.num_retired == 0 or not is_faultless, "P5: a slot was retired without need")
        if self.left == self._all_left():
            require(all(a.sink.end == "ready" for a in self.attempts), "P7: without a fault every transfer arrives")

    def is_cancelled(self, sink: ModelSink) -> bool:
        return any(a.is_cancelled for a in self.attempts if a.sink is sink)

    def key(self) -> bytes:
        """Equal for worlds that go on alike."""
        parts: list[object] = [self.now, sorted(self.left.items()), self.pool.free, self.dead, sorted(self.agents)]
        for attempt in self.attempts:
            parts.append((attempt.num_chunks, attempt.is_cancelled, attempt.source.outcome, attempt.sink.end, attempt.sink.blocks))
            parts.append(sorted(attempt.sink._published))
            if attempt.sender is not None:
                s = attempt.sender
                parts.append(
                    (s.state.value, s._num_ready, s._num_planned, list(s._pieces), s.last_progress, s._first_tokens is None)
                )
            if attempt.receiver is not None:
                r = attempt.receiver
                parts.append((r.state.value, r.num_slots_wanted, sorted(r.lent), sorted(r._verified), r._has_stopped))
                parts.append((r.last_progress, r.waiting_since, r.num_revoked))
        for node, agent in self.agents.items():
            for ring in (agent.send_ring, agent.receive_ring):
                for peer, segment in ring._segments.items():
                    parts.append((peer, [(x.index, x.generation) for x in segment._free], sorted(x.index for x in segment._lent)))
            out = agent._outgoing
            parts.append([(q.target, q.piece) for queue in out._queues.values() for q in queue])
            parts.append((node, sorted(agent._incoming._parked), sorted(agent._peers._gone)))
        for ends, frames in sorted(self.net.control.items()):
            numbers = [_FRAME.unpack_from(frame)[6:] for frame in frames]
            last = self._last_heard(*ends)
            parts.append((ends, [frame[:_NUMBERS_AT] + frame[_FRAME.size :] for frame in frames]))
            parts.append([(link - last[0], sequence - last[1]) for link, sequence in numbers])  # how far on, not how far
        for number, p in self.net.payloads.items():
            parts.append((number, p.tag, p.target, p.has_arrived, b"" if p.has_arrived else bytes(p.message)))
        parts.append([sorted(t.posted) for t in self.net.nodes.values()])
        return blake2b(repr(parts).encode(), digest_size=16).digest()

    # -- events

    def _on_offer(self, i: int) -> None:
        attempt = self.attempts[i]
        shipment = Shipment(attempt.transfer_id, b"t" * 16, self.scenario.blocks * LAYOUT.block_size, LAYOUT)
        attempt.sender = self.agents[attempt.prefill].offer(shipment, self._address(D), attempt.source)

    def _on_expect(self, i: int) -> None:
        attempt = self.attempts[i]
        num_tokens = self.scenario.blocks * LAYOUT.block_size
        expectation = Expectation(
            attempt.transfer_id, b"t" * 16, self._address(attempt.prefill).incarnation, num_tokens, LAYOUT, FINGERPRINT[:8]
        )
        attempt.receiver = self.agents[D].expect(expectation, self._address(attempt.prefill), attempt.sink)

    def _on_compute(self, i: int) -> None:
        attempt, scenario = self.attempts[i], self.scenario
        attempt.num_chunks += 1
        attempt.source.num_computed = scenario.blocks * attempt.num_chunks // scenario.chunks
        assert attempt.sender is not None
        attempt.sender.computed(attempt.source.num_computed * LAYOUT.block_size)
        if attempt.num_chunks == scenario.chunks:
            attempt.sender.finish([kv_pb2.FirstToken(token_id=attempt.request)])

    def _on_control(self, ends: str) -> None:
        frame = self._frames(ends).popleft()
        deliver = self.net.nodes[self._ends(ends)[1]].on_control
        assert deliver is not None
        deliver(memoryview(frame))

    def _on_payload(self, number: int) -> None:
        payload = self.net.payloads[number]
        buffer, done = self.net.nodes[payload.target].posted.pop(payload.tag)
        buffer[: len(payload.message)] = payload.message
        payload.has_arrived = True
        if payload.source not in self.agents:
            del self.net.payloads[number]
        done(None)

    def _on_sent(self, number: int) -> None:
        self.net.payloads.pop(number).sent(None)

    def _on_tick(self, node: str) -> None:
        self.agents[node].tick()

    def _on_abort(self, i: int) -> None:
        sender = self.attempts[i].sender
        assert sender is not None
        sender.abort("test")

    def _on_cancel(self, i: int) -> None:
        attempt = self.attempts[i]
        assert attempt.receiver is not None
        attempt.is_cancelled = True
        attempt.receiver.close("cancelled", is_retryable=False)

    def _on_tell(self, i: int) -> None:
        attempt = self.attempts[i]
        assert attempt.receiver is not None
        attempt.is_cancelled = True
        attempt.receiver.close("attempt over", is_retryable=False)

    def _on_revoke(self, i: int) -> None:
        receiver = self.attempts[i].receiver
        assert receiver is not None
        receiver.revoke("test")

    def _on_crash(self, node: str) -> None:
        """Its memory is still there for what reads it (shared memory outlives a process), its code is not."""
        del self.agents[node]
        self.dead.append(node)
        self.net.control = {ends: frames for ends, frames in self.net.control.items() if ends[1] != node}

    def _on_gone(self, node: str) -> None:
        """The router tells decode; the worker starts again, and what was under way is submitted anew."""
        self.dead.remove(node)
        self.agents[D].peer_gone(self._address(node).incarnation)
        self._prefill = node + "'"
        self._start(self._prefill)
        for attempt in [a for a in self.attempts if a.prefill == node and a.sink.end != "ready"]:
            attempt.is_cancelled = True
            require(attempt.sink.end or attempt.receiver is None, "P5: a transfer outlives its peer")
            self._submit(attempt.request)
        for request in range(self.scenario.late):
            self._submit(self.scenario.requests + request)

    def _on_jump(self, node: str) -> None:
        self.now += JUMP_S
        if node in self.agents:
            self.agents[node].tick()

    def _on_lose(self, ends: str) -> None:
        self._frames(ends).popleft()

    def _on_repeat(self, ends: str) -> None:
        frames = self._frames(ends)
        frames.appendleft(frames[0])

    # -- inside

    def _start(self, node: str) -> None:
        scenario = self.scenario
        options = AgentOptions(scenario.slots, scenario.slots, slot_bytes_for(LAYOUT.block_bytes))
        self.agents[node] = self._make_agent(
            ModelTransport(self.net, node), self._address(node).incarnation, FINGERPRINT, options,
            clock=lambda: self.now, later=lambda _seconds, _call: _NoTimer(),
        )  # fmt: skip
        self.agents[node].start()

    def _submit(self, request: int) -> None:
        transfer_id = bytes([len(self.attempts) + 1]) * 16
        self.attempts.append(Attempt(request, transfer_id, self._prefill, ModelSource(request), ModelSink(self, request)))

    def _address(self, node: str) -> PeerAddress:
        return PeerAddress(node, blake2b(node.encode(), digest_size=16).digest(), node.encode())

    def _ends(self, ends: str) -> tuple[str, str]:
        return next(pair for pair in self.net.control if "".join(pair) == ends)

    def _last_heard(self, source: str, target: str) -> tuple[int, int]:
        agent = self.agents.get(target)
        return agent._peers._last.get(self._address(source).incarnation, (0, 0)) if agent is not None else (0, 0)

    def _frames(self, ends: str) -> deque[bytes]:
        return self.net.control[self._ends(ends)]

    def _all_left(self) -> dict[str, int]:
        s = self.scenario
        return {"abort": s.aborts, "revoke": s.revokes, "crash": s.crashes, "jump": s.jumps, "lose": s.losses, "repeat": s.repeats}

    @property
    def _has_room(self) -> bool:
        return len(self.pool.free) >= self.scenario.blocks
