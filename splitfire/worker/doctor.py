"""`python -m splitfire.worker.doctor`: one end of a pair without a model, for `splitfire doctor`. It takes a worker's flags.

Its parent writes commands to standard input, one JSON object a line, and reads answers from standard output the same way:
`{"do": "meet", ...}`, `{"do": "measure"}`, `{"do": "copy"}`, `{"do": "digest"}`. The end of the input ends it. What it runs is what
workers run: the agent, the transport the settings name, pack and unpack.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import uvloop

from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.peers import PeerAddress
from kvtransfer.probe import PairRates
from kvtransfer.transport import Transport
from splitfire.core.errors import ConfigError, SplitfireError
from splitfire.core.flags import exit_with, parse_settings
from splitfire.core.layout import KvLayout
from splitfire.core.process import end_with_parent, require_environment
from splitfire.core.settings import WorkerSettings
from splitfire.core.telemetry import configure_logging
from splitfire.engine.kernels.pack import pack, unpack
from splitfire.engine.pool import KvPool
from splitfire.worker.machine import copy_rate, machine_facts
from splitfire.worker.transports import open_transport

MEASURE_S = 5.0  # then the pair does not work
# Blocks of a model of 1 B parameters or so: 512 KiB each, two in a slot of the default size.
LAYOUT = KvLayout("bf16", num_layers=16, num_kv_heads=4, head_dim=64, block_size=32)
NUM_BLOCKS = 64
BLOCKS_PER_PAYLOAD = 2
DIGEST_RUNS = 5  # with and without in turn; the best of each counts


class End:
    """One end. io thread."""

    def __init__(self, settings: WorkerSettings, transport: Transport) -> None:
        incarnation = secrets.token_bytes(16)
        options = AgentOptions(settings.send_slots, settings.receive_slots, settings.slot_size, settings.max_peers)
        self._settings = settings
        self._agent = TransferAgent(transport, incarnation, bytes(32), options)
        self._peer: PeerAddress | None = None

    async def run(self) -> None:
        """Until the parent has had enough."""
        self._agent.start()
        transport = self._agent.transport
        here = {"incarnation": self._agent.incarnation.hex(), "address": transport.address.hex()}
        say({**here, "facts": asdict(machine_facts(transport))})
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            try:
                say(await self._obey(json.loads(line)))
            except SplitfireError as exc:
                say({"error": str(exc)})
        self._agent.close()

    async def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "meet":
                incarnation, address = bytes.fromhex(command["incarnation"]), bytes.fromhex(command["address"])
                self._peer = PeerAddress(command["name"], incarnation, address)
                self._agent.meet(self._peer)
                return {}
            case "measure":
                return await self._measure()
            case "copy":
                return {"bytes_per_s": copy_rate(self._settings.slot_size)}
            case "digest":
                return digest_cost()
        raise ValueError(f"unknown command {command['do']!r}")

    async def _measure(self) -> dict[str, Any]:
        assert self._peer is not None
        found: asyncio.Future[PairRates] = asyncio.get_running_loop().create_future()
        self._agent.measure(self._peer, lambda rates: None if found.done() else found.set_result(rates))
        try:
            async with asyncio.timeout(MEASURE_S):
                return asdict(await found)
        except TimeoutError:
            return {"error": f"the other end did not answer within {MEASURE_S:g} s"}


def digest_cost() -> dict[str, float]:
    """Seconds a byte of pack and unpack together, with and without digests, on one thread. Of the processor's time, so that
    other work does not count."""
    torch.set_num_threads(1)
    pool = KvPool(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
    payload = torch.empty(BLOCKS_PER_PAYLOAD * LAYOUT.block_bytes, dtype=torch.uint8)
    num_bytes = NUM_BLOCKS * LAYOUT.block_bytes

    def move(*, digest: bool) -> float:
        began = time.thread_time()
        for first in range(0, NUM_BLOCKS, BLOCKS_PER_PAYLOAD):
            ids = range(first, first + BLOCKS_PER_PAYLOAD)
            pack(pool, ids, BLOCKS_PER_PAYLOAD * LAYOUT.block_size, LAYOUT.dtype, payload, digest=digest)
            unpack(pool, ids, payload, digest=digest)
        return (time.thread_time() - began) / num_bytes

    runs = [(move(digest=True), move(digest=False)) for _ in range(DIGEST_RUNS + 1)][1:]  # the first one warms up
    return {"with_s_per_byte": min(run[0] for run in runs), "without_s_per_byte": min(run[1] for run in runs)}


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> int:
    try:
        end_with_parent()
        require_environment()
        settings = parse_settings(WorkerSettings, sys.argv[1:], prog="splitfire worker")
        configure_logging(f"doctor-{settings.role}", "error")
        if settings.cpu_numbers:
            os.sched_setaffinity(0, settings.cpu_numbers)
        uvloop.run(End(settings, open_transport(settings)).run())
    except ConfigError as exc:
        return exit_with(exc)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a worker ends: UCX endpoints may block in their destructors
