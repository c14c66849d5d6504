"""Slots in UCX's shared memory, between real processes: written from outside, told from damaged ones, and gone with their owner."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtransfer.transport import slot_tag
from splitfire.core.limits import MAX_SLOT_KEY_BYTES, MIB
from tests.kvtransfer.nodes import Node, content, play, until

pytest.importorskip("ucxx", reason="ucxx is not installed")
from kvtransfer import ucx_memory
from kvtransfer.ucx import UcxTransport

OWNER = """
import asyncio
from kvtransfer.transport import slot_tag
from kvtransfer.ucx import UcxTransport
async def main():
    transport = UcxTransport("lo")
    transport.start(lambda frame: None)
    memory = transport.allocate(1 << 20)
    def arrived(exc):
        print(exc, sum(memory.buffer), flush=True)
    transport.receive(slot_tag(1, 1), memory.buffer, arrived)
    print(transport.address.hex(), memory.key.hex(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@contextmanager
def owner(**environment: str) -> Iterator[tuple[subprocess.Popen[str], bytes, bytes]]:
    """Another process with a receive posted in a slot of 1 MiB; its address and the slot's key."""
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            address, _, key = process.stdout.readline().strip().partition(" ")
            yield process, bytes.fromhex(address), bytes.fromhex(key)
        finally:
            process.kill()


def num_slots_of(pid: int) -> int:
    """Segments of a slot's size that a process made and that exist still. (UCX's own queue lives as long as our endpoint.)"""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return sum(int(size) == MIB and int(creator) == pid for _key, _id, _mode, size, creator, *_ in lines)


def num_mapped() -> int:
    """System V segments mapped into this process."""
    return sum("/SYSV" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_another_process_fills_a_slot_where_it_lies_and_nothing_is_left_of_it_after_a_kill() -> None:
    async def scene() -> None:
        here = Node(UcxTransport("lo")).start()
        with owner() as (process, address, key):
            link = here.transport.connect(address)
            before = num_mapped()
            assert num_slots_of(process.pid) == 1
            room = link.reach(key)
            assert room is not None and len(room) == MIB
            assert num_mapped() == before + 1
            assert link.reach(key) is room, "mapped once"
            room[:] = content(3, MIB)
            link.send_payload(slot_tag(1, 1), memoryview(b""), here.note("send"))
            await until(lambda: bool(here.outcomes["send"]))
            assert process.stdout is not None
            said = await asyncio.to_thread(process.stdout.readline)
            assert said.split() == ["None", str(sum(content(3, MIB)))]
            process.kill()
            process.wait()
            room[:] = bytes(MIB)  # who is in the middle of writing when the owner dies does not die of it
            link.close()
            await until(lambda: num_mapped() == before)
            assert num_slots_of(process.pid) == 0
        here.transport.close()

    play(scene())


def test_a_key_that_is_damaged_or_of_somebody_gone_reaches_nothing() -> None:
    """UCX trusts remote keys; what it would make of these is not found out."""

    async def scene() -> None:
        here = Node(UcxTransport("lo")).start()
        with owner() as (process, address, key):
            link = here.transport.connect(address)
            damaged = [key[:i] + bytes([key[i] ^ 1 << i % 8]) + key[i + 1 :] for i in range(len(key))]
            cut = [key[:i] for i in range(len(key))]
            longer = [key + b"\0", key + bytes(MAX_SLOT_KEY_BYTES), bytes(MAX_SLOT_KEY_BYTES)]
            empty = ucx_memory._KEY.pack(0, 0, ucx_memory._checksum(0, 0, b"x")) + b"x"
            assert [k for k in (*damaged, *cut, *longer, empty) if link.reach(k) is not None] == []
            process.kill()
            process.wait()
            assert link.reach(key) is None, "its memory went with it"
        here.transport.close()

    play(scene())


def test_a_peer_without_shared_memory_is_sent_to() -> None:
    async def scene() -> None:
        here = Node(UcxTransport("lo")).start()
        with owner(UCX_TLS="tcp") as (process, address, key):
            link = here.transport.connect(address)
            assert link.reach(key) is None
            link.send_payload(slot_tag(1, 1), memoryview(content(4, MIB)), here.note("send"))
            await until(lambda: bool(here.outcomes["send"]))
            assert process.stdout is not None
            assert (await asyncio.to_thread(process.stdout.readline)).split() == ["None", str(sum(content(4, MIB)))]
        here.transport.close()

    play(scene())


def test_one_peer_cannot_make_us_map_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_memory, "MAX_REACHED", 3)

    async def scene() -> None:
        here, there = Node(UcxTransport("lo")).start(), Node(UcxTransport("lo")).start()
        link = here.connect(there)
        slots = [there.transport.allocate(4096) for _ in range(5)]
        reached = [link.reach(slot.key) is not None for slot in slots]
        assert reached == [True, True, True, False, False]
        here.transport.close()
        there.transport.close()

    play(scene())
