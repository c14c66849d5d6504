"""Slots on a device: over real UCX, with a device whose bytes only DeviceMemory's calls reach. A GPU is not needed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtransfer import frames
from kvtransfer.device_slots import FIRST_READ, Place, Twin, place_of
from kvtransfer.frames import PAYLOAD, data_offset, front_bytes, parse_frame, parse_payload, write_payload, write_void
from kvtransfer.probe import PairRates
from kvtransfer.sender import Outcome
from kvtransfer.transport import SlotMemory, Transport, slot_tag
from kvtransfer.ucx import UcxTransport
from tests.kvtransfer.fakes import LAYOUT, FakeSink, FakeSource
from tests.kvtransfer.nodes import Node, content, play, until
from tests.kvtransfer.test_agent import TOKEN, make_pair
from tests.kvtransfer.test_frames import HEADER

POISON = 0xEE
INCARNATION = b"I" * 16


class FakeDevice:
    """A slot's memory on a device, full of what an earlier lending left there. `reads` are those of the transport."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes: npt.NDArray[np.uint8] = np.full(num_bytes, POISON, np.uint8)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self._bytes)

    def view(self, num_bytes: int) -> Any:
        return self._bytes[:num_bytes]

    def write_front(self, data: memoryview) -> None:
        self._bytes[: len(data)] = np.frombuffer(data, np.uint8)

    def read_front(self, into: memoryview) -> None:
        self.reads.append(len(into))
        into[:] = self._bytes[: len(into)].data

    def kernel(self, begin: int, end: int) -> memoryview:
        """What packs and unpacks may touch."""
        return self._bytes[begin:end].data


def device_of(part: memoryview) -> FakeDevice:
    place = place_of(part)
    assert place is not None and isinstance(place.device, FakeDevice)
    return place.device


def where_it_lies(part: memoryview) -> memoryview:
    place = place_of(part)
    return part if place is None else device_of(part).kernel(place.begin, place.begin + len(part))


class DeviceTransport(UcxTransport):
    """Its twins are poisoned beyond what the transport reads: who takes blocks from there, or puts them there, is found out."""

    def __init__(self) -> None:
        super().__init__("lo", FakeDevice)
        self.twins: list[memoryview] = []

    def allocate(self, num_bytes: int) -> SlotMemory:
        memory = super().allocate(num_bytes)
        memory.buffer[:] = bytes([POISON]) * num_bytes
        self.twins.append(memory.buffer)
        return memory

    def assert_no_host_access(self) -> None:
        assert self.twins
        for twin in self.twins:
            assert set(twin[FIRST_READ:]) <= {POISON}


def host_transport() -> UcxTransport:
    return UcxTransport("lo")


class DeviceSource(FakeSource):
    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        return super().pack(first_block, num_blocks, dtype, where_it_lies(payload), digest=digest)


class DeviceSink(FakeSink):
    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        return super().write(first_block, num_blocks, where_it_lies(blocks))


PAIRS = {
    "device to device": (DeviceTransport, DeviceTransport),
    "device to host": (DeviceTransport, host_transport),
    "host to device": (host_transport, DeviceTransport),
}
pairs = pytest.mark.parametrize("ends", PAIRS.values(), ids=PAIRS)
Ends = tuple[Callable[[], Transport], Callable[[], Transport]]


@pairs
@pytest.mark.parametrize("num_tokens", [1, 17, 1001])
def test_blocks_go_from_device_to_device_and_their_headers_by_the_host(ends: Ends, num_tokens: int) -> None:
    async def scene() -> None:
        transports = (ends[0](), ends[1]())
        pair = make_pair(transports)
        source, sink = DeviceSource(7), DeviceSink(7)
        pair.expect(sink, num_tokens, b"a" * 16)
        sender = pair.offer(source, num_tokens, b"a" * 16)
        sender.computed(num_tokens)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        sink.assert_right(LAYOUT.blocks_for(num_tokens))
        pair.assert_no_leaks()
        pair.prefill.close()
        pair.decode.close()
        for transport in transports:
            if isinstance(transport, DeviceTransport):
                transport.assert_no_host_access()

    play(scene())


@pairs
def test_a_pair_measures_itself_and_a_slot_that_is_given_back_empty_comes_back(ends: Ends) -> None:
    async def scene() -> None:
        pair = make_pair((ends[0](), ends[1]()))
        results: list[PairRates] = []
        pair.decode.meet(pair.at_prefill)
        pair.prefill.measure(pair.at_decode, results.append)
        await until(lambda: bool(results))
        sink = DeviceSink(7)
        pair.expect(sink, 1001, b"a" * 16)
        sender = pair.offer(DeviceSource(7), 1001, b"a" * 16)
        sender.computed(1001)
        await until(lambda: sink.holds_blocks and pair.decode.num_held_slots > 0)
        sender.abort("the request ended")
        await until(lambda: pair.prefill.num_open == pair.decode.num_open == 0)
        await until(lambda: pair.prefill.num_held_slots == pair.decode.num_held_slots == 0)
        pair.prefill.close()
        pair.decode.close()

    play(scene())


def write_message(slot: memoryview, num_blocks: int, block_bytes: int) -> int:
    """A payload of blocks that lie on the device already."""
    begin, num_bytes = data_offset(num_blocks), num_blocks * block_bytes
    where_it_lies(slot[begin : begin + num_bytes])[:] = content(3, num_bytes)
    said = replace(HEADER, block_start=0, block_end=num_blocks, block_bytes=block_bytes, payload_bytes=num_bytes)
    return write_payload(slot, INCARNATION, said, list(range(num_blocks)))


@pytest.mark.parametrize("num_blocks", [1, 498, 499])
def test_a_front_of_many_digests_is_read_whole(num_blocks: int) -> None:
    """One reading of the device is enough up to 498 blocks, and two always are."""

    async def scene() -> None:
        here, there = Node(DeviceTransport()).start(), Node(DeviceTransport()).start()
        size = 1 << 16
        slot, landing = (node.transport.allocate(size).buffer for node in (here, there))
        length = write_message(slot, num_blocks, 64)
        there.transport.receive(slot_tag(1, 1), landing, there.note("receive"))
        here.connect(there).send_payload(slot_tag(1, 1), slot[:length], here.note("send"))
        await until(lambda: bool(there.outcomes["receive"] and here.outcomes["send"]))
        assert there.outcomes["receive"] == here.outcomes["send"] == [None]
        payload = parse_payload(parse_frame(landing).body)
        assert payload.digests == tuple(range(num_blocks))
        assert where_it_lies(payload.blocks) == content(3, num_blocks * 64)
        front = data_offset(num_blocks)
        assert device_of(landing).reads == ([FIRST_READ] if num_blocks <= 498 else [FIRST_READ, front])
        here.transport.close()
        there.transport.close()

    play(scene())


def test_a_message_of_the_host_arrives_in_a_slot_on_a_device() -> None:
    """A void, which no slot is needed for; what was in the slot before does not become a payload."""

    async def scene() -> None:
        here, there = Node(DeviceTransport()).start(), Node(DeviceTransport()).start()
        landing = there.transport.allocate(1 << 14).buffer
        void = memoryview(bytearray(64))
        length = write_void(void, INCARNATION)
        there.transport.receive(slot_tag(1, 1), landing, there.note("receive"))
        here.connect(there).send_payload(slot_tag(1, 1), void[:length], here.note("send"))
        await until(lambda: bool(there.outcomes["receive"]))
        frame = parse_frame(landing)
        assert (frame.kind, frame.incarnation, len(frame.body)) == (frames.VOID, INCARNATION, 0)
        here.transport.close()
        there.transport.close()

    play(scene())


def test_slots_on_a_device_have_no_key_and_those_of_others_are_not_written_from_there() -> None:
    async def scene() -> None:
        here, host, there = (Node(transport).start() for transport in (DeviceTransport(), host_transport(), host_transport()))
        assert here.transport.allocate(1 << 14).key == b""
        memory = there.transport.allocate(1 << 14)
        assert host.connect(there).reach(memory.key) is not None
        assert here.connect(there).reach(memory.key) is None
        for node in (here, host, there):
            node.transport.close()

    play(scene())


def test_a_part_of_a_twin_is_found_on_its_device_and_host_memory_is_not() -> None:
    device = FakeDevice(1 << 14)
    twin = memoryview(Twin.of(device))
    assert len(twin) == 1 << 14
    assert place_of(twin) == Place(device, 0)
    assert place_of(twin[64:][100:200]) == Place(device, 164)
    assert place_of(twin[:0]) is None
    assert place_of(memoryview(bytearray(8))) is None


def test_the_front_is_never_longer_than_the_message_whatever_it_says() -> None:
    slot = memoryview(bytearray(1 << 14))
    length = write_payload(slot, INCARNATION, replace(HEADER, block_bytes=64, payload_bytes=128), [1, 2])
    assert front_bytes(slot) == front_bytes(slot[:length]) == length - 128 == data_offset(2)
    assert front_bytes(slot[:40]) == 40 and front_bytes(slot[:39]) == 39 and front_bytes(slot[:0]) == 0
    assert front_bytes(slot[:100]) == 40
    at = 40 + struct.calcsize("<8s16sIIBBBxHHHH")
    for lie in ((0, 2**32 - 1), (2**32 - 1, 0)):
        struct.pack_into("<II", slot, at, *lie)
        assert front_bytes(slot) in (data_offset(0), len(slot))
    assert slot[5] == PAYLOAD
    write_void(slot, INCARNATION, len(slot))
    assert front_bytes(slot) == 40


def test_ucx_is_told_to_write_to_the_peer_unless_somebody_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    context = UcxTransport.__init__.__globals__["libucxx"].UCXContext

    def watched(options: dict[str, str], **more: Any) -> Any:
        asked.append(dict(options))
        return context(options, **more)

    monkeypatch.setattr(UcxTransport.__init__.__globals__["libucxx"], "UCXContext", watched)

    async def scene() -> None:
        for make in (DeviceTransport, host_transport):
            make().close()
        monkeypatch.setenv("UCX_RNDV_SCHEME", "get_zcopy")
        DeviceTransport().close()

    asyncio.run(scene())
    assert asked == [{"NET_DEVICES": "lo", "RNDV_SCHEME": "put_zcopy"}, {"NET_DEVICES": "lo"}, {"NET_DEVICES": "lo"}]
