"""What every transport promises the agent, over each of them: memory, tcp (on both event loops) and real UCX."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import pytest
import uvloop

from kvtransfer.frames import MAX_FRAME_BYTES
from kvtransfer.memory import Hub
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport, slot_tag
from splitfire.core.errors import Unavailable
from splitfire.core.limits import MIB
from tests.kvtransfer.nodes import SENTINEL, Node, content, play, settle, until

LARGEST_FRAME = MAX_FRAME_BYTES
Scene = Coroutine[object, object, None]


@dataclass
class World:
    """Transports of one kind that can reach each other, and the event loop they run on."""

    create: Callable[[], Transport]
    run: Callable[[Scene], None] = asyncio.run
    has_keys: bool = False  # slots may be filled where they lie

    def play(self, scene: Scene) -> None:
        play(scene, self.run)

    def nodes(self, count: int) -> list[Node]:
        return [Node(self.create()).start() for _ in range(count)]


@pytest.fixture(params=["memory", "one memory", "tcp", "tcp on uvloop", "ucx"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "memory":
        return World(Hub().create)
    if request.param == "one memory":
        return World(Hub(is_one_memory=True).create, has_keys=True)
    if request.param == "tcp":
        return World(TcpTransport)
    if request.param == "tcp on uvloop":
        return World(TcpTransport, uvloop.run)
    pytest.importorskip("ucxx", reason="ucxx is not installed")
    from kvtransfer.ucx import UcxTransport

    return World(lambda: UcxTransport("lo"), has_keys=True)


def close(*nodes: Node) -> None:
    for node in nodes:
        node.transport.close()


def test_control_frames_arrive_whole_and_in_order(world: World) -> None:
    sizes = [33, LARGEST_FRAME, *(int(33 * (LARGEST_FRAME / 33) ** random.Random(i).random()) for i in range(3000)), LARGEST_FRAME]
    sent = [i.to_bytes(4, "little") + bytes([i % 251]) * (size - 4) for i, size in enumerate(sizes)]

    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        for frame in sent:
            link.send_control(frame)
        await until(lambda: len(there.frames) >= len(sent))
        assert there.frames == sent
        assert not here.frames
        close(here, there)

    world.play(scene())


@pytest.mark.parametrize("num_bytes", [32, 64, 65, 4095, 1 * MIB, 4 * MIB, 4 * MIB + 64])
@pytest.mark.parametrize("spare", [0, 4096])
def test_a_payload_of_any_size_arrives_intact_and_nothing_after_it_is_touched(world: World, num_bytes: int, spare: int) -> None:
    async def scene() -> None:
        here, there = world.nodes(2)
        slot, message = there.slot(num_bytes + spare), here.slot(num_bytes)
        message[:] = content(num_bytes, num_bytes)
        there.transport.receive(slot_tag(1, 1), slot, there.note("receive"))
        here.connect(there).send_payload(slot_tag(1, 1), message, here.note("send"))
        await until(lambda: bool(there.outcomes["receive"] and here.outcomes["send"]))
        assert slot[:num_bytes] == message
        assert bytes(slot[num_bytes:]) == bytes([SENTINEL]) * spare
        await settle()
        assert there.outcomes["receive"] == here.outcomes["send"] == [None], "each done exactly once"
        close(here, there)

    world.play(scene())


def test_a_slot_with_a_key_is_filled_where_it_lies_and_received_like_any_other(world: World) -> None:
    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        assert link.reach(b"") is None
        memory = there.transport.allocate(MIB)
        there.transport.receive(slot_tag(1, 1), memory.buffer, there.note("receive"))
        room = link.reach(memory.key)
        assert (room is not None) == world.has_keys == bool(memory.key)
        if room is not None:
            room[:] = content(1, MIB)
            await settle()
            assert not there.outcomes["receive"], "nobody was told"
            link.send_payload(slot_tag(1, 1), memoryview(b""), here.note("send"))
            await until(lambda: bool(there.outcomes["receive"] and here.outcomes["send"]))
            assert there.outcomes["receive"] == here.outcomes["send"] == [None]
            assert memory.buffer == content(1, MIB)
        close(here, there)

    world.play(scene())


def test_receives_are_matched_by_tag_whatever_the_order_of_sends(world: World) -> None:
    """Indices and generations at both ends of their ranges."""
    tags = [slot_tag(index, generation) for index in (0, 1, 77, 0xFFFFFF) for generation in (0, 1, 2, 0xFFFFFFFF)]

    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        slots = {tag: there.slot(10_000) for tag in tags}
        for tag, slot in slots.items():
            there.transport.receive(tag, slot, there.note(str(tag)))
        for tag in random.Random(5).sample(tags, len(tags)):
            link.send_payload(tag, memoryview(content(tag, 9_999)), here.note(str(tag)))
        await until(lambda: all(there.outcomes[str(tag)] and here.outcomes[str(tag)] for tag in tags))
        await settle()
        for tag, slot in slots.items():
            assert bytes(slot) == content(tag, 9_999) + bytes([SENTINEL])
            assert there.outcomes[str(tag)] == here.outcomes[str(tag)] == [None]
        close(here, there)

    world.play(scene())


def test_two_peers_of_one_receiver_do_not_mix(world: World) -> None:
    async def scene() -> None:
        first, second, receiver = world.nodes(3)
        slots = {(peer, i): receiver.slot(MIB) for peer in (0, 1) for i in range(6)}
        links = [node.connect(receiver) for node in (first, second)]
        for (peer, i), slot in slots.items():
            receiver.transport.receive(slot_tag(peer, i), slot, receiver.note(f"{peer} {i}"))
        for i in range(6):
            for peer, (node, link) in enumerate(zip((first, second), links, strict=True)):
                link.send_payload(slot_tag(peer, i), memoryview(content(peer * 100 + i, MIB)), node.note(str(i)))
                link.send_control(bytes([peer, i]) * 50)
        await until(lambda: all(receiver.outcomes[f"{peer} {i}"] for peer, i in slots) and len(receiver.frames) == 12)
        assert all(outcome == [None] for node in (first, second, receiver) for outcome in node.outcomes.values())
        for (peer, i), slot in slots.items():
            assert slot == content(peer * 100 + i, MIB)
        for peer in (0, 1):
            assert [f for f in receiver.frames if f[0] == peer] == [bytes([peer, i]) * 50 for i in range(6)]
        close(first, second, receiver)

    world.play(scene())


def test_control_and_payload_interleave(world: World) -> None:
    """Sizes that do not divide each other, so that records begin anywhere in what the kernel hands over."""

    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        slots = [there.slot(300_000) for _ in range(40)]
        for i, slot in enumerate(slots):
            there.transport.receive(slot_tag(i, 1), slot, there.note(str(i)))
        for i in range(40):
            for j in range(5):
                link.send_control(bytes([i, j]) * (20 + 7 * i))
            link.send_payload(slot_tag(i, 1), memoryview(content(i, 1_000 + 7_001 * i)), here.note(str(i)))
        await until(lambda: len(there.frames) == 200 and all(there.outcomes[str(i)] and here.outcomes[str(i)] for i in range(40)))
        assert there.frames == [bytes([i, j]) * (20 + 7 * i) for i in range(40) for j in range(5)]
        assert all(outcome == [None] for node in (here, there) for outcome in node.outcomes.values())
        for i, slot in enumerate(slots):
            assert slot[: 1_000 + 7_001 * i] == content(i, 1_000 + 7_001 * i)
        close(here, there)

    world.play(scene())


def test_both_directions_at_once(world: World) -> None:
    async def scene() -> None:
        nodes = world.nodes(2)
        slots = [[node.slot(2 * MIB) for _ in range(4)] for node in nodes]
        for node, mine in zip(nodes, slots, strict=True):
            for i, slot in enumerate(mine):
                node.transport.receive(slot_tag(i, 1), slot, node.note(f"receive {i}"))
        for k, node in enumerate(nodes):
            link = node.connect(nodes[1 - k])
            for i in range(4):
                link.send_payload(slot_tag(i, 1), memoryview(content(10 * k + i, 2 * MIB)), node.note(f"send {i}"))
        await until(lambda: all(len(n.outcomes) == 8 and all(n.outcomes.values()) for n in nodes))
        assert all(outcome == [None] for node in nodes for outcome in node.outcomes.values())
        for k, mine in enumerate(slots):
            for i, slot in enumerate(mine):
                assert slot == content(10 * (1 - k) + i, 2 * MIB)
        close(*nodes)

    world.play(scene())


def test_buffers_are_used_again_after_their_done(world: World) -> None:
    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        slot, message = there.slot(MIB), here.slot(MIB)
        for generation in range(30):
            seed = generation % 3
            message[:] = content(seed, MIB)
            there.transport.receive(slot_tag(1, generation), slot, there.note(f"receive {generation}"))
            link.send_payload(slot_tag(1, generation), message, here.note(f"send {generation}"))
            await until(lambda: here.outcomes[f"send {generation}"] == [None])  # noqa: B023
            message[:] = bytes(MIB)  # ours again, whether or not it has arrived
            await until(lambda: there.outcomes[f"receive {generation}"] == [None])  # noqa: B023
            assert slot == content(seed, MIB)
        close(here, there)

    world.play(scene())


def test_no_done_runs_inside_the_call_that_asked_for_it(world: World) -> None:
    """The agent's queue sends the next piece when one is done: inside the call, that would be a recursion without end."""

    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        for i in range(20):
            there.transport.receive(slot_tag(i, 1), there.slot(64), there.note(f"receive {i}"))
            assert not there.outcomes[f"receive {i}"]
            link.send_payload(slot_tag(i, 1), memoryview(bytes(64)), here.note(f"send {i}"))
            assert not here.outcomes[f"send {i}"]
            await until(lambda: bool(here.outcomes[f"send {i}"] and there.outcomes[f"receive {i}"]))  # noqa: B023
        close(here, there)

    world.play(scene())


def test_a_vanished_peer_blocks_nobody_and_nothing_raises(world: World) -> None:
    async def scene() -> None:
        here, gone, other = world.nodes(3)
        link, to_other = here.connect(gone), here.connect(other)
        link.send_control(b"hello" * 10)
        await until(lambda: len(gone.frames) == 1)
        gone.transport.close()
        longest = 0.0
        for i in range(50):
            began = time.perf_counter()
            link.send_control(bytes(100))
            link.send_payload(slot_tag(i, 1), memoryview(bytes(MIB)), here.note(f"gone {i}"))
            longest = max(longest, time.perf_counter() - began)
            await asyncio.sleep(0.002)
        other.transport.receive(slot_tag(0, 1), other.slot(MIB), other.note("receive"))
        to_other.send_payload(slot_tag(0, 1), memoryview(content(3, MIB)), here.note("send"))
        await until(lambda: other.outcomes["receive"] == here.outcomes["send"] == [None])
        assert longest < 1.0, "a send waited for the peer"
        link.close()
        link.send_control(bytes(100))
        link.send_payload(slot_tag(60, 1), memoryview(bytes(64)), here.note("gone 60"))
        await settle()
        assert all(len(here.outcomes[f"gone {i}"]) <= 1 for i in range(61))
        assert len(gone.frames) == 1, "delivered after close"
        close(here, other)

    world.play(scene())


def test_a_receive_that_was_taken_back_is_never_written_to(world: World) -> None:
    """K3: only where that is certain may the memory be used again; UCX gives no such promise."""

    async def scene() -> None:
        sender, receiver = world.nodes(2)
        link = sender.connect(receiver)
        buffers = [receiver.slot(4096) for _ in range(2)]
        done: list[int] = []
        for i, buffer in enumerate(buffers):
            receiver.transport.receive(slot_tag(i, 1), buffer, lambda _exc, i=i: done.append(i))  # type: ignore[misc]
        is_ours = receiver.transport.cancel(slot_tag(0, 1))
        assert is_ours or receiver.transport.name == "ucx"
        assert not receiver.transport.cancel(slot_tag(7, 1)), "nothing was posted"
        for i in range(2):
            link.send_payload(slot_tag(i, 1), memoryview(bytes([i + 1]) * 4096), lambda _exc: None)
        await until(lambda: 1 in done)
        await settle()
        assert bytes(buffers[1]) == b"\x02" * 4096
        if is_ours:
            assert done == [1] and bytes(buffers[0]) == bytes([SENTINEL]) * 4096
        close(sender, receiver)

    world.play(scene())


def test_close_with_operations_outstanding_is_quiet(world: World) -> None:
    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        link.send_control(bytes(64))
        await until(lambda: len(there.frames) == 1)
        for i in range(8):
            there.transport.receive(slot_tag(i, 1), there.slot(4 * MIB), there.note("receive"))
            there.transport.receive(slot_tag(i, 2), there.slot(4 * MIB), there.note("receive"))
            link.send_payload(slot_tag(i, 1), memoryview(bytes(4 * MIB)), here.note("send"))
            link.send_control(bytes(1000))
        await asyncio.sleep(0)
        close(here, there)
        before = len(there.frames), len(there.outcomes["receive"]), len(here.outcomes["send"])
        link.send_control(bytes(64))
        link.close()
        await settle()
        assert (len(there.frames), len(there.outcomes["receive"]), len(here.outcomes["send"])) == before, "delivered after close"
        close(here, there)

    world.play(scene())


def test_an_address_survives_its_trip_and_a_malformed_one_is_unavailable(world: World) -> None:
    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.transport.connect(bytes.fromhex(there.transport.address.hex()))
        link.send_control(b"right" * 10)
        await until(lambda: there.frames == [b"right" * 10])
        address = there.transport.address
        for malformed in (b"", address[:-1], address + b"x", b"\0" * len(address), bytes(range(200)), b"nowhere:1"):
            with pytest.raises(Unavailable) as caught:
                here.transport.connect(malformed)
            assert caught.value.reason == "handoff_unreachable"
        close(here, there)

    world.play(scene())


def test_an_idle_transport_costs_nothing(world: World) -> None:
    """Connected, a receive posted, nothing moving: the loop sleeps."""

    async def scene() -> None:
        here, there = world.nodes(2)
        link = here.connect(there)
        there.transport.receive(slot_tag(1, 1), there.slot(MIB), there.note("receive"))
        link.send_control(bytes(64))
        link.send_payload(slot_tag(1, 1), memoryview(bytes(MIB)), here.note("send"))
        there.transport.receive(slot_tag(1, 2), there.slot(MIB), there.note("next receive"))
        await until(lambda: bool(there.frames and there.outcomes["receive"] and here.outcomes["send"]))
        await settle()
        before = time.thread_time()
        await asyncio.sleep(1.0)
        assert time.thread_time() - before < 0.01
        close(here, there)

    world.play(scene())
