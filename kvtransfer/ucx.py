"""UCX through ucxx's core objects: shared memory between processes of one host, RDMA or TCP between hosts.

What was learnt the hard way (docs/decisions/0003-ucx.md): endpoints made from worker addresses, with error handling on
and allowed for the shared-memory transports, move 7-10 GB/s between processes; host:port endpoints fall to TCP. A dead
peer is not reported on that path, and `close` may block, so links are parked, never closed. UCX prints its log to
stdout unless told otherwise, before it is loaded. Slots may lie on a GPU: UCX then moves them by cuda_ipc, or through the host where
it cannot, and writes to the peer rather than reads from it, because reading is off without NVLink.

Runs on the io thread: progress when UCX's file descriptor is readable, and armed to sleep when nothing moves.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from kvtransfer.device_slots import DeviceMemory, Twin, after_fetch, array_of, send_front
from kvtransfer.frames import MAX_FRAME_BYTES
from kvtransfer.transport import Done, Link, OnControl, SlotMemory
from splitfire.core.errors import ConfigError, Unavailable

# What UCX may register memory with. It then watches every unmapping, by patching functions as it is loaded, which takes 0.4 s.
REGISTERING = (
    "/sys/class/infiniband",
    "/dev/xpmem",
    "/dev/knem",
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/kfd",
    "/dev/dri",
    "/dev/dxg",
)

for _name, _value in {
    "UCX_POSIX_ERROR_HANDLING": "y",
    "UCX_SYSV_ERROR_HANDLING": "y",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "stderr",
    **({} if any(Path(place).exists() for place in REGISTERING) else {"UCX_MEM_MMAP_HOOK_MODE": "none"}),
}.items():
    os.environ.setdefault(_name, _value)  # read by UCX when it is loaded, on the next lines

from ucxx._lib import libucxx  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402

from kvtransfer.ucx_memory import OwnMemory, PeerMemory  # noqa: E402  libucp is loaded now

log = structlog.get_logger("worker")
_ADDRESS = struct.Struct("<3sBB8s")  # magic, UCX major and minor version, checksum; UCX's own address follows
CONTROL_KIND, PAYLOAD_KIND = 1 << 56, 2 << 56  # beside it: the id of the link, or the slot's tag
KIND_MASK = 0xFF << 56
ANY_CONTROL, KIND_TAG_MASK = libucxx.UCXXTag(CONTROL_KIND), libucxx.UCXXTagMask(KIND_MASK)
_FEATURES = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP, libucxx.Feature.RMA)
ROUNDS_PER_TURN = 64  # of progress, before the event loop gets its turn
BUSY_S = 0.001  # until the next turn when a whole one moved nothing and UCX would not be armed


@dataclass(slots=True)
class _Operation:
    """A request on its way. `buffer` keeps the memory alive while UCX uses it."""

    request: Any
    buffer: Any
    done: Done


@dataclass(slots=True)
class _Arriving:
    """A control frame whose receive was posted. `error` when it was too long."""

    data: Any
    is_complete: bool = False
    error: Exception | None = None


class UcxTransport:
    """One UCX worker. `devices` bounds which network devices it may listen and connect on (`lo` for one host). With
    `allocate_on_device` its slots are not in host memory."""

    name = "ucx"

    def __init__(self, devices: str | None = None, allocate_on_device: Callable[[int], DeviceMemory] | None = None) -> None:
        _check_devices(devices)
        options = {"NET_DEVICES": devices} if devices else {}
        if allocate_on_device is not None and "UCX_RNDV_SCHEME" not in os.environ:
            options["RNDV_SCHEME"] = "put_zcopy"
        try:
            self._context = libucxx.UCXContext(options, feature_flags=_FEATURES)
            self._worker = libucxx.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            self._worker.init_blocking_progress_mode()
        except libucxx.UCXError as exc:
            raise ConfigError(f"UCX cannot start on devices {devices or 'all'}: {exc}; `ip link` lists what exists") from exc
        self.version = ".".join(str(part) for part in libucxx.get_ucx_version())
        self.address: bytes = _seal(libucxx.UCXAddress.create_from_worker(self._worker).tobytes())
        self.dropped: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_control: OnControl | None = None
        self._own_memory = OwnMemory(self._context)
        self._allocate_on_device = allocate_on_device
        self._peer_memories: list[PeerMemory] = []
        self._operations: list[_Operation] = []
        self._arriving: dict[int, deque[_Arriving]] = {}  # by link, in the order of its sends
        self._parked: list[Any] = []
        self._is_kicked = False
        self._retry: asyncio.TimerHandle | None = None

    def start(self, on_control: OnControl) -> None:
        self._on_control = on_control
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._worker.epoll_file_descriptor, self._turn)
        self._turn()

    def allocate(self, num_bytes: int) -> SlotMemory:
        if self._allocate_on_device is not None:
            return SlotMemory(memoryview(Twin.of(self._allocate_on_device(num_bytes))))
        return self._own_memory.allocate(num_bytes)

    def connect(self, address: bytes) -> Link:
        raw = _unseal(address)
        try:
            peer = libucxx.UCXAddress.create_from_buffer(raw)
            endpoint = libucxx.UCXEndpoint.create_from_worker_address(self._worker, peer, endpoint_error_handling=True)
        except (libucxx.UCXError, ValueError) as exc:
            message = f"UCX cannot reach the peer: {exc}; are both workers' --ucx-devices on one network?"
            raise Unavailable(message, reason="handoff_unreachable") from exc
        memory = PeerMemory(endpoint)
        self._peer_memories.append(memory)
        return _UcxLink(self, endpoint, memory, reaches_slots=self._allocate_on_device is None)

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        array = Array(array_of(buffer))
        self.began(self._worker.tag_recv(array, libucxx.UCXXTag(PAYLOAD_KIND | tag)), array, after_fetch(buffer, done))

    def cancel(self, tag: int) -> bool:
        return False  # the peer may be writing by rendezvous, and UCX does not say when it stopped

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._worker.epoll_file_descriptor)
            self._loop = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._operations.clear()
        while self._peer_memories:
            self._peer_memories.pop().close()

    def park(self, endpoint: Any, memory: PeerMemory) -> None:
        """Keeps an endpoint we are done with: closing one whose peer died has been seen to block for ever."""
        self._parked.append(endpoint)
        if memory in self._peer_memories:
            self._peer_memories.remove(memory)
            memory.close()

    def began(self, request: Any, buffer: Any, done: Done) -> None:
        """An operation was posted: watch it, and let UCX make progress soon."""
        self._operations.append(_Operation(request, buffer, done))
        if not self._is_kicked and self._loop is not None:
            self._is_kicked = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Progress until nothing moves, then arm: the descriptor becomes readable when something does.

        UCX refuses to be armed, and the descriptor stays readable, while a peer whose loop is busy has not taken what was sent
        to it. Turning on and on would burn this core for as long, so neither is asked for a moment (0.13 -> 0.04 s of 0.2).
        """
        self._is_kicked = False
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
            if self._loop is not None:
                self._loop.add_reader(self._worker.epoll_file_descriptor, self._turn)
        if self._loop is None:
            return
        is_fruitful = False
        for _ in range(ROUNDS_PER_TURN):
            self._worker.progress()
            has_moved = self._complete_operations()
            has_moved |= self._receive_control()
            if self._is_kicked or self._worker.arm():  # what was posted meanwhile has a turn of its own
                return
            is_fruitful |= has_moved
        if is_fruitful:
            self._is_kicked = True
            self._loop.call_soon(self._turn)
        else:
            self._loop.remove_reader(self._worker.epoll_file_descriptor)
            self._retry = self._loop.call_later(BUSY_S, self._turn)

    def _complete_operations(self) -> bool:
        if not self._operations:
            return False
        done: list[_Operation] = []
        pending: list[_Operation] = []
        for operation in self._operations:
            (done if operation.request.completed else pending).append(operation)
        if not done:
            return False
        self._operations = pending
        for operation in done:
            _finish(operation.request, operation.done)
        return True

    def _receive_control(self) -> bool:
        has_moved = False
        while True:
            found = self._worker.tag_probe(ANY_CONTROL, KIND_TAG_MASK, True)
            if not found.matched:
                return has_moved
            has_moved = True
            # Over the limit it is received into too little room: UCX reports a truncation, and nothing was allocated for it.
            data = np.empty(min(found.length, MAX_FRAME_BYTES), np.uint8)
            array = Array(data)
            request = self._worker.tag_recv_with_handle(array, found)
            link = found.sender_tag.value
            if request.completed and link not in self._arriving:  # a small frame is here already, and overtakes none
                _finish(request, partial(self._deliver, data))
                continue
            frame = _Arriving(data)
            self._arriving.setdefault(link, deque()).append(frame)
            self.began(request, array, partial(self._arrived, link, frame))

    def _arrived(self, link: int, frame: _Arriving, exc: Exception | None) -> None:
        """Frames complete out of order when a long one goes by rendezvous; one that never does holds up its own link alone."""
        frame.error, frame.is_complete = exc, True
        queue = self._arriving[link]
        while queue and queue[0].is_complete:
            first = queue.popleft()
            self._deliver(first.data, first.error)
        if not queue:
            del self._arriving[link]

    def _deliver(self, data: Any, exc: Exception | None) -> None:
        if exc is not None:
            self.dropped["too_long"] += 1
        elif self._on_control is not None:
            self._on_control(memoryview(data))


def _finish(request: Any, done: Done) -> None:
    error: Exception | None = None
    try:
        request.check_error()
    except libucxx.UCXError as exc:
        error = exc
    try:
        done(error)
    except Exception:  # one transfer's bug must not cost the others their completions
        log.exception("completion failed")


def _seal(address: bytes) -> bytes:
    """UCX aborts the process on an address that is damaged or of another minor version, so it is checked before UCX sees it."""
    major, minor, *_ = libucxx.get_ucx_version()
    return _ADDRESS.pack(b"UCX", major, minor, blake2b(address, digest_size=8).digest()) + address


def _unseal(sealed: bytes) -> bytes:
    ours = libucxx.get_ucx_version()
    if len(sealed) > _ADDRESS.size:
        magic, major, minor, digest = _ADDRESS.unpack_from(sealed)
        address = sealed[_ADDRESS.size :]
        if magic == b"UCX" and (major, minor) != (ours[0], ours[1]):
            raise Unavailable(
                f"the peer has UCX {major}.{minor}, this worker {ours[0]}.{ours[1]}; run the same", reason="handoff_ucx_version"
            )
        if magic == b"UCX" and digest == blake2b(address, digest_size=8).digest():
            return address
    raise Unavailable("the peer's UCX address is damaged", reason="handoff_unreachable")


def _check_devices(devices: str | None) -> None:
    """UCX only warns of a device that does not exist, and then has no network at all."""
    existing = [entry.name for place in ("/sys/class/net", "/sys/class/infiniband") for entry in sorted(Path(place).glob("*"))]
    for device in devices.split(",") if devices else ():
        if existing and device.split(":")[0] not in existing:
            raise ConfigError(f"ucx_devices: there is no {device}; this machine has {', '.join(existing)}")


class _UcxLink:
    def __init__(self, transport: UcxTransport, endpoint: Any, memory: PeerMemory, *, reaches_slots: bool) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._memory = memory
        self._reaches_slots = reaches_slots  # from a device they are sent to
        self._control_tag = libucxx.UCXXTag(CONTROL_KIND | secrets.randbits(56))  # tells the receiver which frames are in one order

    def send_control(self, frame: bytes) -> None:
        array = Array(np.frombuffer(frame, np.uint8))
        request = self._endpoint.tag_send(array, self._control_tag)
        if not request.completed:  # a small frame is gone at once, and nothing has to be watched
            self._transport.began(request, array, _ignore)

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        send_front(message)
        array = Array(array_of(message))
        self._transport.began(self._endpoint.tag_send(array, libucxx.UCXXTag(PAYLOAD_KIND | tag)), array, done)

    def reach(self, key: bytes) -> memoryview | None:
        return self._memory.view(key) if key and self._reaches_slots else None

    def close(self) -> None:
        self._transport.park(self._endpoint, self._memory)


def _ignore(_exc: Exception | None) -> None:
    """A control frame that is lost is missed by its number."""
