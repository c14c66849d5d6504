"""What a worker tells of its machine: core's facts, those its libraries know, and how fast it copies memory."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from kvtransfer.probe import NUM_PAYLOADS, WINDOW
from kvtransfer.transport import Transport, private_memory
from splitfire.core.machine import MachineFacts, look_around
from splitfire.engine.kernels import native

COPY_RUNS = 3  # the best counts: the others were interrupted


def machine_facts(transport: Transport) -> MachineFacts:
    return replace(
        look_around(),
        num_cuda_devices=torch.cuda.device_count(),
        has_compiled_kernels=native.is_available(),
        transport=transport.name,
        transport_version=transport.version,
    )


def copy_rate(slot_bytes: int) -> float:
    """Bytes per second of memcpy, for the same bytes in the same order as a measurement of a pair: what no transport can beat
    by much. Takes a few milliseconds."""
    sources, targets = ([_memory(slot_bytes) for _ in range(WINDOW)] for _ in range(2))
    best = float("inf")
    for _ in range(COPY_RUNS):
        began = time.perf_counter()
        for i in range(NUM_PAYLOADS):
            targets[i % WINDOW][:] = sources[i % WINDOW]
        best = min(best, time.perf_counter() - began)
    return NUM_PAYLOADS * slot_bytes / max(best, 1e-9)


def _memory(num_bytes: int) -> memoryview:
    """As a transport's slots are, and written once."""
    memory = private_memory(num_bytes)
    memory[:] = bytes(num_bytes)
    return memory
