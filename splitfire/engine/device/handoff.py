"""A GPU's part in hand-offs: memory that other processes may map, and the stream on which KV is packed and unpacked. io thread.

Packing and unpacking have a stream of their own, so that neither waits for a step, and it goes before steps where both want the
processors. What is packed was computed by steps that are over, and no step in flight writes into blocks that are lent (scheduler.py).
Importing this touches no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from splitfire.core.errors import ConfigError, Unavailable

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
UNSHARED = {"expandable_segments": "true", "backend": "cudamallocasync"}  # settings whose memory cuda_ipc cannot share


class SlotTensor:
    """One slot: kvtransfer's DeviceMemory. What is copied is there when a call returns."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        try:
            with on_handoff_stream(device):  # or it would be cleared behind a step, when something has arrived in it
                self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as exc:
            message = f"the GPU has no {num_bytes} bytes left for a slot; give --kv-memory less"
            raise Unavailable(message, reason="handoff_no_memory") from exc

    def __len__(self) -> int:
        return len(self.bytes)

    def view(self, num_bytes: int) -> Any:
        return self.bytes[:num_bytes]

    def write_front(self, data: memoryview) -> None:
        with on_handoff_stream(self.bytes.device):
            self.bytes[: len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))

    def read_front(self, into: memoryview) -> None:
        with on_handoff_stream(self.bytes.device):
            torch.frombuffer(into, dtype=torch.uint8).copy_(self.bytes[: len(into)])


@contextmanager
def on_handoff_stream(device: torch.device) -> Iterator[None]:
    """What is done within waits for nothing but what was done so before, and is complete when it ends. Off a GPU: no difference."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def require_shareable(environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError where PyTorch is told to take GPU memory in a way in which no other process can map it."""
    said = {name: environment[name] for name in ALLOCATOR_VARIABLES if name in environment}
    in_effect = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # of torch, private: also what a program has set
    if in_effect is not None:
        said["the setting of PyTorch's allocator"] = in_effect()
    for name, value in said.items():
        for key, wrong in UNSHARED.items():
            if f"{key}:{wrong}" in value.lower().replace(" ", "").split(","):
                raise ConfigError(
                    f"{name} is {value}: memory that is taken so cannot be handed to another process on the GPU; leave {key} out, or use "
                    "--transport tcp"
                )
