"""A process full of fake workers (fake_worker.py), attached to real routers. Event loop only."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.router.fake_worker import TOTAL_BLOCKS, FakeWorker, FleetShape, Shipping, Told
from splitfire.core.fingerprint import PROTOCOL_MAJOR, Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.wire import fingerprint_to_wire, layout_to_wire
from splitfire.v1 import fleet_pb2
from splitfire.v1 import inference_pb2 as pb

CHUNK_TOKENS = 8192
MAX_RUNNING = 1024
ATTACH_S = 10.0


class FakeFleet:
    """The process's workers, as the benchmark orders them about."""

    def __init__(self, model: str) -> None:
        self._model = ModelDir(Path(model))
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[FakeWorker] = []
        self._shipping = Shipping()
        self._told = Told()

    async def attach(self, addresses: Sequence[str], shape: FleetShape) -> None:
        """Every worker to every router, as a worker of its own at each: what one computes does not slow the other."""
        await self.detach()
        self._shipping, self._told = Shipping(), Told()
        for address in addresses:
            for i in range(shape.prefill + shape.decode):
                is_prefill = i < shape.prefill
                name = f"{'prefill' if is_prefill else 'decode'}-{i}-{secrets.token_hex(3)}"
                hello = _hello(self._model, name, is_prefill, shape)
                worker = FakeWorker(name, is_prefill, shape, hello, self._shipping, self._told)
                attached = asyncio.Event()
                self._workers.append(worker)
                running = asyncio.create_task(worker.run(address, attached), name=name)
                self._tasks.append(running)
                waiting = asyncio.create_task(attached.wait())
                await asyncio.wait((running, waiting), timeout=ATTACH_S, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if not attached.is_set():
                    raise RuntimeError(f"{name} could not attach: {running.exception() if running.done() else 'no answer'}")

    async def detach(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks, self._workers = [], []

    def told(self) -> Told:
        return self._told

    def num_open(self) -> int:
        """Attempts and hand-offs that have not ended: none when nobody asks anything."""
        return sum(len(w.open) + len(w.running) for w in self._workers) + len(self._shipping)


def _hello(model: ModelDir, name: str, is_prefill: bool, shape: FleetShape) -> fleet_pb2.Hello:
    config = model.config
    fingerprint = Fingerprint(
        Random(0).randbytes(32), model.config_digest, model.tokenizer_digest, model.rope_digest(config.max_positions), "plain",
        shape.block_size,
    )  # fmt: skip
    return fleet_pb2.Hello(
        worker_id=name,
        incarnation=secrets.token_bytes(16),
        role=pb.ROLE_PREFILL if is_prefill else pb.ROLE_DECODE,
        version=fleet_pb2.ProtocolVersion(major=PROTOCOL_MAJOR),
        fingerprint=fingerprint_to_wire(fingerprint),
        kv_format=layout_to_wire(KvLayout("bf16", 6, 2, 64, shape.block_size)),
        transports=[fleet_pb2.TransportAddress(name="ucx", version="1.21", address=b"nowhere")],
        capacity=fleet_pb2.Capacity(
            total_blocks=TOTAL_BLOCKS,
            max_running=MAX_RUNNING,
            max_context=config.max_positions,
            chunk_tokens=CHUNK_TOKENS,
            is_first_come=True,
        ),
        host="here",
        sends_cache_events=shape.speed.cached_blocks > 0,
        has_no_prefix_cache=shape.speed.cached_blocks == 0,
    )
