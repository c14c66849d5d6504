"""The hand-off between two agents, over the memory transport and over real UCX: delivered, or ended and leak-free."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from kvtransfer import incoming as incoming_module
from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.expectation import Expectation, Room
from kvtransfer.frames import slot_bytes_for
from kvtransfer.memory import Hub
from kvtransfer.peers import PeerAddress
from kvtransfer.probe import PairMeter, PairRates
from kvtransfer.protocol import Send
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Outcome, Sender, Shipment
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from kvtransfer.ucx import UcxTransport
from splitfire.core.errors import Unavailable
from splitfire.v1 import kv_pb2
from tests.kvtransfer.fakes import FINGERPRINT, LAYOUT, FakeSink, FakeSource

TOKEN = kv_pb2.FirstToken(choice=0, offset=0, token_id=42)
SLOT_BYTES = slot_bytes_for(LAYOUT.block_bytes) * 3


@dataclass
class Pair:
    """Two agents that know each other."""

    prefill: TransferAgent
    decode: TransferAgent
    at_prefill: PeerAddress
    at_decode: PeerAddress

    def offer(self, source: FakeSource, num_tokens: int, transfer_id: bytes, token: bytes = b"t" * 16) -> Sender:
        return self.prefill.offer(Shipment(transfer_id, token, num_tokens, LAYOUT), self.at_decode, source)

    def expect(self, sink: FakeSink, num_tokens: int, transfer_id: bytes, token: bytes = b"t" * 16) -> Receiver:
        expectation = Expectation(transfer_id, token, self.prefill.incarnation, num_tokens, LAYOUT, FINGERPRINT[:8])
        return self.decode.expect(expectation, self.at_prefill, sink)

    def assert_no_leaks(self) -> None:
        for agent in (self.prefill, self.decode):
            assert agent.num_open == 0
            assert agent.num_held_slots == 0


def make_pair(transports: tuple[Transport, Transport], receive_slots: int = 4) -> Pair:
    options = AgentOptions(send_slots=2, receive_slots=receive_slots, slot_bytes=SLOT_BYTES)
    agents = [TransferAgent(t, secrets.token_bytes(16), FINGERPRINT, options) for t in transports]
    for agent in agents:
        agent.start()
    addresses = [PeerAddress(f"worker-{i}", a.incarnation, a.transport.address) for i, a in enumerate(agents)]
    return Pair(agents[0], agents[1], addresses[0], addresses[1])


async def until(condition: Callable[[], bool], seconds: float = 10.0, every_s: float = 0.001) -> None:
    """every_s: 0 for what may be over again soon."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never came true"
        await asyncio.sleep(every_s)


def memory_transports() -> tuple[Transport, Transport]:
    hub = Hub()
    return hub.create(), hub.create()


def one_memory_transports() -> tuple[Transport, Transport]:
    hub = Hub(is_one_memory=True)
    return hub.create(), hub.create()


def ucx_transports() -> tuple[Transport, Transport]:
    return UcxTransport("lo"), UcxTransport("lo")


def tcp_transports() -> tuple[Transport, Transport]:
    return TcpTransport(), TcpTransport()


@pytest.fixture(
    params=[memory_transports, one_memory_transports, tcp_transports, ucx_transports], ids=["memory", "one memory", "tcp", "ucx"]
)
def transports(request: pytest.FixtureRequest) -> Any:
    return request.param


def play(scene: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 60))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 16 * 20, 1001])
@pytest.mark.parametrize("first_block", [0, 1])
def test_every_block_arrives_as_it_was(
    transports: Callable[[], tuple[Transport, Transport]], num_tokens: int, first_block: int
) -> None:
    async def scene() -> None:
        pair = make_pair(transports())
        source, sink = FakeSource(7), FakeSink(7, first_block=min(first_block, (num_tokens - 1) // 16))
        pair.expect(sink, num_tokens, b"a" * 16)
        sender = pair.offer(source, num_tokens, b"a" * 16)
        for computed in range(0, num_tokens, 100):
            sender.computed(computed)
            await asyncio.sleep(0)
        sender.computed(num_tokens)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        sink.assert_right(LAYOUT.blocks_for(num_tokens))
        assert [t.token_id for t in sink.first_tokens] == [42]
        pair.assert_no_leaks()
        pair.prefill.close()
        pair.decode.close()

    play(scene())


@pytest.mark.parametrize("num_bytes", [0, 100, 1000])
def test_a_key_of_less_than_the_slot_that_was_granted_is_not_written_past(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leads to may be anything: then the payload is sent."""
    reached: list[memoryview] = []

    def reach(_link: object, _key: bytes) -> memoryview:
        reached.append(memoryview(bytearray(num_bytes)))
        return reached[-1]

    async def scene() -> None:
        pair = make_pair(one_memory_transports())
        monkeypatch.setattr(type(pair.prefill._peers.get(pair.at_decode).link), "reach", reach)
        num_tokens = LAYOUT.block_size * 20
        source, sink = FakeSource(7), FakeSink(7)
        pair.expect(sink, num_tokens, b"a" * 16)
        sender = pair.offer(source, num_tokens, b"a" * 16)
        sender.computed(num_tokens)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        sink.assert_right(20)
        assert reached and not any(any(room) for room in reached), "nothing was written there"
        pair.assert_no_leaks()

    play(scene())


def test_many_transfers_share_a_small_ring(transports: Callable[[], tuple[Transport, Transport]]) -> None:
    async def scene() -> None:
        pair = make_pair(transports(), receive_slots=2)
        sources, sinks = [FakeSource(i) for i in range(12)], [FakeSink(i) for i in range(12)]
        for i, (source, sink) in enumerate(zip(sources, sinks, strict=True)):
            pair.expect(sink, 16 * 11, bytes([i]) * 16)
            sender = pair.offer(source, 16 * 11, bytes([i]) * 16)
            sender.computed(16 * 11)
            sender.finish([TOKEN])
        await until(lambda: all(s.outcome is not None for s in sources))
        for sink in sinks:
            sink.assert_right(11)
        pair.assert_no_leaks()
        pair.prefill.close()
        pair.decode.close()

    play(scene())


def test_an_offer_that_comes_before_its_submit_is_parked() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        source, sink = FakeSource(1), FakeSink(1)
        sender = pair.offer(source, 40, b"a" * 16)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        pair.expect(sink, 40, b"a" * 16)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is Outcome.RECEIVED)
        sink.assert_right(3)

    play(scene())


def test_a_receiver_short_of_blocks_waits_and_grants_later() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        source, sink = FakeSource(1), FakeSink(1, num_not_now=3)
        pair.expect(sink, 40, b"a" * 16)
        sender = pair.offer(source, 40, b"a" * 16)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is Outcome.RECEIVED)
        sink.assert_right(3)

    play(scene())


def test_a_wrong_one_time_token_is_refused() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        source, sink = FakeSource(1), FakeSink(1)
        pair.expect(sink, 40, b"a" * 16, token=b"x" * 16)
        pair.offer(source, 40, b"a" * 16)
        await until(lambda: source.outcome is not None)
        assert (source.outcome, source.reason) == (Outcome.REFUSED, "unknown_transfer")
        assert sink.end == "unknown_transfer" and not sink.holds_blocks
        pair.assert_no_leaks()

    play(scene())


class BrokenSource(FakeSource):
    """Sends something else than what it digested."""

    def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
        sums = super().pack(first_block, num_blocks, dtype, payload, digest=digest)
        payload[len(payload) // 2] ^= 0x10
        return sums


def test_one_flipped_bit_is_found_and_nothing_is_written() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        source, sink = BrokenSource(1), FakeSink(1)
        pair.expect(sink, 40, b"a" * 16)
        sender = pair.offer(source, 40, b"a" * 16)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.ABORTED_BY_PEER and source.reason == "kv_digest_mismatch"
        assert sink.end == "kv_digest_mismatch" and not sink.written
        await until(lambda: pair.decode.num_held_slots == 0)
        pair.assert_no_leaks()

    play(scene())


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("turns", range(0, 24, 3))
def test_an_abort_at_any_time_leaves_nothing_behind(
    transports: Callable[[], tuple[Transport, Transport]], side: str, turns: int
) -> None:
    async def scene() -> None:
        pair = make_pair(transports(), receive_slots=2)
        source, sink = FakeSource(1), FakeSink(1)
        receiver = pair.expect(sink, 16 * 30, b"a" * 16)
        sender = pair.offer(source, 16 * 30, b"a" * 16)
        sender.computed(16 * 30)
        sender.finish([TOKEN])
        for _ in range(turns):
            await asyncio.sleep(0)
        if side == "prefill":
            sender.abort("test")
        else:
            receiver.close("test", is_retryable=True)
        await until(lambda: source.outcome is not None and bool(sink.end))
        await until(lambda: pair.decode.num_held_slots + pair.prefill.num_held_slots == 0)
        assert sink.end == "ready" or not sink.holds_blocks
        pair.assert_no_leaks()
        # The ring still works.
        source, sink = FakeSource(2), FakeSink(2)
        pair.expect(sink, 100, b"b" * 16)
        sender = pair.offer(source, 100, b"b" * 16)
        sender.computed(100)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is Outcome.RECEIVED)
        sink.assert_right(7)
        pair.prefill.close()
        pair.decode.close()

    play(scene())


def test_a_lost_peer_ends_its_transfers_and_its_slots_are_replaced() -> None:
    async def scene() -> None:
        hub = Hub()
        pair = make_pair((hub.create(), hub.create()))
        source, sink = FakeSource(1), FakeSink(1)
        pair.expect(sink, 16 * 30, b"a" * 16)
        pair.offer(source, 16 * 30, b"a" * 16).computed(16 * 12)
        await until(lambda: bool(sink.written))
        hub.lose(pair.at_prefill.address)
        pair.decode.peer_gone(pair.prefill.incarnation)
        assert sink.end == "peer_gone" and not sink.holds_blocks
        assert pair.decode.num_open == 0 and pair.decode.num_held_slots == 0

    play(scene())


def test_a_receiver_lost_in_mid_send_costs_its_slots_and_nobody_elses_transfer() -> None:
    async def scene() -> None:
        hub = Hub()
        pair = make_pair((hub.create(), hub.create()))

        class LosesItsPeer(FakeSource):
            def pack(self, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool) -> list[int]:
                hub.lose(pair.at_decode.address)  # the send that follows never completes
                return super().pack(first_block, num_blocks, dtype, payload, digest=digest)

        source, sink = LosesItsPeer(1), FakeSink(1)
        pair.expect(sink, 16 * 30, b"a" * 16)
        pair.offer(source, 16 * 30, b"a" * 16).computed(16 * 30)
        await until(lambda: pair.prefill.send_ring.num_lent == 2)
        pair.prefill.peer_gone(pair.decode.incarnation)
        assert source.outcome is Outcome.ABORTED
        assert pair.prefill.num_open == 0 and pair.prefill.num_held_slots == 0 and not pair.prefill.is_worn_out

        options = AgentOptions(send_slots=2, receive_slots=4, slot_bytes=SLOT_BYTES)
        fresh = TransferAgent(hub.create(), secrets.token_bytes(16), FINGERPRINT, options)
        fresh.start()
        fresh_address = PeerAddress("worker-2", fresh.incarnation, fresh.transport.address)
        second = Pair(pair.prefill, fresh, pair.at_prefill, fresh_address)
        next_source, next_sink = FakeSource(2), FakeSink(2)
        second.expect(next_sink, 16 * 30, b"b" * 16)
        sender = second.offer(next_source, 16 * 30, b"b" * 16)
        sender.computed(16 * 30)
        sender.finish([TOKEN])
        await until(lambda: next_source.outcome is not None)
        assert next_source.outcome is Outcome.RECEIVED
        next_sink.assert_right(30)
        second.assert_no_leaks()

    play(scene())


def test_slots_that_a_sender_gave_up_on_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver's stream to the router broke for a moment: prefill was told that it is gone, decode never of prefill."""
    monkeypatch.setattr(incoming_module, "LOST_S", 0.2)

    async def scene() -> None:
        pair = make_pair(memory_transports())
        source, sink = FakeSource(1), FakeSink(1)
        receiver = pair.expect(sink, 16 * 60, b"a" * 16)
        pair.offer(source, 16 * 60, b"a" * 16).computed(16 * 60)
        await until(lambda: pair.decode.receive_ring.num_lent > 0)
        pair.prefill.peer_gone(pair.decode.incarnation)  # drops what it had queued, and everything decode says
        receiver.close("request ended", is_retryable=False)  # the router's loss ended decode's job
        await until(lambda: pair.decode.num_open == 0 and pair.decode.num_held_slots == 0)
        assert pair.decode.receive_ring.num_retired == 0, "this transport can take a receive back"
        pair.prefill.meet(pair.at_decode)
        source, sink = FakeSource(2), FakeSink(2)
        pair.expect(sink, 16 * 60, b"b" * 16)
        sender = pair.offer(source, 16 * 60, b"b" * 16)
        sender.computed(16 * 60)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        pair.assert_no_leaks()

    play(scene())


def test_a_peer_that_a_router_introduces_again_is_listened_to() -> None:
    """Its stream to the router broke for a moment: the same process, the same incarnation."""

    async def scene() -> None:
        pair = make_pair(memory_transports())
        for agent, other in ((pair.prefill, pair.at_decode), (pair.decode, pair.at_prefill)):
            agent.meet(other)
            agent.peer_gone(other.incarnation)
            with pytest.raises(Unavailable, match="is gone"):
                agent.expect(Expectation(b"x" * 16, b"t" * 16, other.incarnation, 1, LAYOUT, FINGERPRINT[:8]), other, FakeSink(1))
            agent.meet(other)
        source, sink = FakeSource(1), FakeSink(1)
        pair.expect(sink, 40, b"a" * 16)
        sender = pair.offer(source, 40, b"a" * 16)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        pair.assert_no_leaks()

    play(scene())


def test_a_measurement_that_starts_over_leaks_no_slot() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        pair.decode.meet(pair.at_prefill)
        results: list[float] = []
        pair.prefill.measure(pair.at_decode, lambda found: results.append(found.bytes_per_s))
        peer = pair.prefill._peers.get(pair.at_decode)
        for _ in range(3):  # in the middle of the payloads, as a timer that is too short would
            await until(lambda: pair.decode.receive_ring.num_lent > 0, every_s=0)
            pair.prefill._measure(peer, lambda found: results.append(found.bytes_per_s))
        await until(lambda: bool(results))
        await until(lambda: pair.decode.num_held_slots == pair.prefill.num_held_slots == 0)
        pair.assert_no_leaks()

    play(scene())


def test_pongs_of_an_earlier_measurement_give_their_slots_back_and_count_for_nothing() -> None:
    sent: list[kv_pb2.KvMessage] = []
    filled: list[int] = []
    results: list[float] = []

    async def scene() -> None:
        pair = make_pair(memory_transports())
        meter = PairMeter(
            pair.prefill, sent.append, lambda slot: filled.append(slot.index), lambda found: results.append(found.round_trip_s)
        )
        meter.start()
        run = sent[0].ping.run
        old = kv_pb2.Pong(run=run ^ 1, num_arrived=32)
        old.slots.slots.add(index=3, generation=1)
        for _ in range(40):
            meter.on_pong(old)
        assert (meter.num_pongs, len(filled), len(sent), results) == (0, 40, 1, [])
        meter.on_pong(kv_pb2.Pong(run=run))
        assert (meter.num_pongs, len(sent)) == (1, 2)

    play(scene())


def test_a_repeated_offer_reserves_once() -> None:
    """F39."""

    async def scene() -> None:
        pair = make_pair(memory_transports())

        class Counting(FakeSink):
            num_reserved = 0

            def reserve(self) -> int | Room:
                self.num_reserved += 1
                return super().reserve()

        source, sink = FakeSource(1), Counting(1)
        pair.expect(sink, 40, b"a" * 16)
        sender = pair.offer(source, 40, b"a" * 16)
        sender.offer()
        await until(lambda: sender.state is Send.GRANTED)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is not None)
        assert (source.outcome, sink.num_reserved) == (Outcome.RECEIVED, 1)
        pair.assert_no_leaks()

    play(scene())


@pytest.mark.parametrize("where", ["pack", "write", "publish", "reserve", "ready"])
def test_a_bug_in_one_transfer_ends_that_one_alone(
    transports: Callable[[], tuple[Transport, Transport]], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        pair = make_pair(transports())

        def broken(*_args: object) -> Any:
            raise ZeroDivisionError

        bad_source, bad_sink, source, sink = FakeSource(1), FakeSink(1), FakeSource(2), FakeSink(2)
        monkeypatch.setattr(bad_source if where == "pack" else bad_sink, where, broken)
        for transfer_id, one_source, one_sink in ((b"a" * 16, bad_source, bad_sink), (b"b" * 16, source, sink)):
            pair.expect(one_sink, 16 * 30, transfer_id)
            sender = pair.offer(one_source, 16 * 30, transfer_id)
            sender.computed(16 * 30)
            sender.finish([TOKEN])
        await until(lambda: source.outcome is not None and bad_source.outcome is not None)
        assert source.outcome is Outcome.RECEIVED
        sink.assert_right(30)
        if where != "ready":  # said received before
            assert bad_source.outcome is not Outcome.RECEIVED
        if where != "pack":
            assert bad_sink.end and not bad_sink.holds_blocks, "its owner was told"
        await until(lambda: pair.prefill.num_open == pair.decode.num_open == 0)
        await until(lambda: pair.prefill.num_held_slots == pair.decode.num_held_slots == 0)
        pair.assert_no_leaks()
        pair.prefill.close()
        pair.decode.close()

    play(scene())


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "empty", "another version"])
def test_an_address_that_ucx_would_abort_on_is_an_error(damage: str) -> None:
    ours, theirs = ucx_transports()
    address = bytearray(theirs.address)
    if damage == "cut":
        del address[-5:]
    elif damage == "flipped":
        address[40] ^= 1
    elif damage == "garbage":
        address[:] = bytes(range(200))
    elif damage == "empty":
        address.clear()
    else:
        address[4] += 1
    with pytest.raises(Unavailable, match="run the same" if damage == "another version" else "is damaged"):
        ours.connect(bytes(address))
    ours.connect(theirs.address)


def test_messages_of_a_stale_incarnation_are_dropped() -> None:
    async def scene() -> None:
        pair = make_pair(memory_transports())
        sink = FakeSink(1)
        pair.expect(sink, 40, b"a" * 16)
        pair.decode.peer_gone(pair.prefill.incarnation)
        pair.offer(FakeSource(1), 40, b"b" * 16)
        await until(lambda: pair.decode.dropped.get("stale_incarnation", 0) == 1)
        assert sink.end == "peer_gone"

    play(scene())


def test_a_pair_measures_itself(transports: Callable[[], tuple[Transport, Transport]]) -> None:
    async def scene() -> None:
        pair = make_pair(transports())
        results: list[PairRates] = []
        pair.decode.meet(pair.at_prefill)
        pair.prefill.measure(pair.at_decode, results.append)
        await until(lambda: bool(results))
        [found] = results
        assert 0 < found.round_trip_s <= found.round_trip_p99_s < 1 and found.bytes_per_s > 0
        assert found.path == ("network" if pair.prefill.transport.name == "tcp" else "shared memory")
        pair.assert_no_leaks()
        pair.prefill.close()
        pair.decode.close()

    play(scene())


def test_a_peer_beyond_the_limit_is_met_measured_and_lost_like_any_other() -> None:
    """There is no ring for it: it may not end the control stream it came with, nor the worker that hears of its end."""

    async def scene() -> None:
        hub = Hub()
        options = AgentOptions(send_slots=2, receive_slots=2, slot_bytes=SLOT_BYTES, max_peers=1)
        agents = [TransferAgent(hub.create(), bytes([i]) * 16, FINGERPRINT, options) for i in range(3)]
        addresses = [PeerAddress(f"worker-{i}", a.incarnation, a.transport.address) for i, a in enumerate(agents)]
        unhandled: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
        for agent in agents:
            agent.start()
        here, first, second = agents
        for one, other in ((here, 1), (here, 2), (first, 0), (second, 0)):
            one.meet(addresses[other])
        results: list[str] = []
        first.measure(addresses[0], lambda *_found: results.append("first"))
        await until(lambda: results == ["first"])
        second.measure(addresses[0], lambda *_found: results.append("second"))  # which lends it nothing
        here.measure(addresses[1], lambda *_found: results.append("here"))
        await until(lambda: results == ["first", "here"])
        here.measure(addresses[2], lambda *_found: results.append("without a slot of its own"))
        await until(lambda: len(results) == 3)
        for agent in agents:
            agent.peer_gone(addresses[2].incarnation)
        source, sink = FakeSource(1), FakeSink(1)
        pair = Pair(first, here, addresses[1], addresses[0])
        pair.expect(sink, 40, b"a" * 16)
        sender = pair.offer(source, 40, b"a" * 16)
        sender.computed(40)
        sender.finish([TOKEN])
        await until(lambda: source.outcome is Outcome.RECEIVED)
        await until(lambda: not any(a.num_held_slots or a.num_open for a in agents))
        for agent in agents:
            agent.close()
        assert not unhandled

    play(scene())


def test_counters_of_the_wire_run_over_without_anybody_noticing() -> None:
    """Generations of slots and numbers of frames have 32 bits: some weeks of a busy pair."""

    async def scene() -> None:
        pair = make_pair(memory_transports())
        for agent, other in ((pair.prefill, pair.at_decode), (pair.decode, pair.at_prefill)):
            agent._peers.get(other)._num_sent = 2**32 - 3
        segment = pair.decode.receive_ring.segment(pair.prefill.incarnation)
        for slot in segment._free:
            slot.generation = 2**32 - 2
        for i in range(12):
            source, sink = FakeSource(i), FakeSink(i)
            pair.expect(sink, 16 * 11, bytes([i]) * 16)
            sender = pair.offer(source, 16 * 11, bytes([i]) * 16)
            sender.computed(16 * 11)
            sender.finish([TOKEN])
            await until(lambda source=source: source.outcome is not None)  # type: ignore[misc]
            assert source.outcome is Outcome.RECEIVED
            sink.assert_right(11)
        pair.assert_no_leaks()
        assert all(0 < slot.generation < 100 for slot in segment._free) and not pair.decode.dropped

    play(scene())
