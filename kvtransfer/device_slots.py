"""Slots that lie on a device (a GPU), and their twins in host memory. io thread.

The protocol sees a slot as a memoryview. That of a slot on a device is of its *twin*: as long, but only its front is ever touched,
the headers and digests that stand before the blocks (frames.py). A transport with such slots copies the front to the device before it
sends, and back when something has arrived; who packs and unpacks blocks asks `place_of` where they lie. So what decides about
transfers knows nothing of devices, and the bytes of blocks never come near the host.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from kvtransfer.frames import front_bytes
from kvtransfer.transport import Done

FIRST_READ = 4096  # bytes from the device when something has arrived: the front of 498 blocks, which few slots hold


class DeviceMemory(Protocol):
    """One slot's memory. Its bytes are reached by these calls alone."""

    def __len__(self) -> int: ...

    def view(self, num_bytes: int) -> Any:
        """The first bytes, as UCX takes them: an object with `__cuda_array_interface__`."""

    def write_front(self, data: memoryview) -> None:
        """Writes the first bytes. When this returns they are there."""

    def read_front(self, into: memoryview) -> None:
        """Reads the first bytes, which a transport has written before."""


class Twin(mmap.mmap):
    """Invariant: beyond the front it is neither read nor written, so that it has no pages there."""

    device: DeviceMemory

    @classmethod
    def of(cls, device: DeviceMemory) -> Twin:
        twin = cls(-1, len(device), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        twin.device = device
        return twin


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a slot lies."""

    device: DeviceMemory
    begin: int  # bytes from that of the slot


def place_of(part: memoryview) -> Place | None:
    """Of a part of a twin, which is not empty; None for memory of the host."""
    twin = part.obj
    if not isinstance(twin, Twin) or not len(part):
        return None
    return Place(twin.device, _address(part) - _address(memoryview(twin)))


def array_of(message: memoryview) -> Any:
    """A message, from the beginning of its slot on, as UCX takes it: for one in a twin that is memory of the device."""
    place = place_of(message)
    if place is None:
        return np.frombuffer(message, np.uint8)
    assert place.begin == 0, place.begin
    return place.device.view(len(message))


def send_front(message: memoryview) -> None:
    """Before a message is sent: what stands before its blocks goes to the device."""
    place = place_of(message)
    if place is not None:
        place.device.write_front(message[: front_bytes(message)])


def after_fetch(slot: memoryview, done: Done) -> Done:
    """`done`, with what stands before the blocks of what arrived copied to the twin first."""
    place = place_of(slot)
    return done if place is None else partial(_fetch, place.device, slot, done)


def _fetch(device: DeviceMemory, slot: memoryview, done: Done, exc: Exception | None) -> None:
    if exc is None:
        num_bytes = min(FIRST_READ, len(slot))
        device.read_front(slot[:num_bytes])
        if front_bytes(slot) > num_bytes:
            device.read_front(slot[: front_bytes(slot)])
    done(exc)


def _address(part: memoryview) -> int:
    return np.frombuffer(part, np.uint8).ctypes.data
