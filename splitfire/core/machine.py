"""What a process can see of the machine it runs on, as far as it matters to KV between processes. Reads /proc, /dev and /sys.

Nothing here raises: what a kernel or a container does not tell is 0, or empty. Library versions and the like are told by
the process that has the library loaded.
"""

from __future__ import annotations

import os
import re
import resource
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from splitfire.v1 import inference_pb2 as pb

UNLIMITED = (1 << 64) - 1
SHARED_MEMORY, NETWORK, UNKNOWN = PATHS = "shared memory", "network", "unknown"  # what carries KV between two processes
UCX_SETTINGS = ("UCX_TLS", "UCX_NET_DEVICES")  # those that decide which way the bytes take
MAX_SETTING_CHARS = 256
SHM = "/dev/shm"  # noqa: S108 - where POSIX shared memory is


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The file system of POSIX shared memory. All 0 when there is none."""

    num_bytes: int = 0
    free_bytes: int = 0
    is_writable: bool = False


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The kernel's numbers of them; 0 is unknown."""

    ipc: int = 0
    pid: int = 0
    network: int = 0

    def differing(self, other: Namespaces) -> tuple[str, ...]:
        """Names of those that two processes do not share. What is unknown is not said to differ."""
        both = ((name, getattr(self, name), getattr(other, name)) for name in ("ipc", "pid", "network"))
        return tuple(name for name, mine, theirs in both if mine and theirs and mine != theirs)


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """One process's view. `machine_id` is equal on two processes under one kernel, whatever containers they are in."""

    machine_id: str
    num_cpus: int
    num_gpus: int
    memlock_bytes: int
    shm: SharedMemory
    namespaces: Namespaces
    has_rdma: bool
    ucx_settings: tuple[str, ...] = ()
    num_cuda_devices: int = 0
    has_compiled_kernels: bool = False
    transport: str = ""
    transport_version: str = ""


def look_around(environment: Mapping[str, str] | None = None) -> MachineFacts:
    """The facts that need no library; `dataclasses.replace` adds the others."""
    environment = os.environ if environment is None else environment
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return MachineFacts(
        machine_id=machine_id(),
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=_num_gpus(environment.get("CUDA_VISIBLE_DEVICES")),
        memlock_bytes=UNLIMITED if soft == resource.RLIM_INFINITY else soft,
        shm=_shared_memory(SHM),
        namespaces=Namespaces(_namespace("ipc"), _namespace("pid"), _namespace("net")),
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
        ucx_settings=tuple(f"{name}={environment[name]}"[:MAX_SETTING_CHARS] for name in UCX_SETTINGS if environment.get(name)),
    )


def machine_id() -> str:
    """One kernel, booted once. A digest, because the boot id itself is nobody's business."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = os.uname().nodename.encode()
    return blake2b(boot.strip(), digest_size=8).hexdigest()


def facts_to_wire(facts: MachineFacts) -> pb.MachineFacts:
    return pb.MachineFacts(
        machine_id=facts.machine_id, num_cpus=facts.num_cpus, num_gpus=facts.num_gpus, num_cuda_devices=facts.num_cuda_devices,
        memlock_bytes=facts.memlock_bytes, shm_bytes=facts.shm.num_bytes, shm_free_bytes=facts.shm.free_bytes,
        is_shm_writable=facts.shm.is_writable, ipc_namespace=facts.namespaces.ipc, pid_namespace=facts.namespaces.pid,
        network_namespace=facts.namespaces.network, has_rdma=facts.has_rdma, has_compiled_kernels=facts.has_compiled_kernels,
        transport=facts.transport, transport_version=facts.transport_version, ucx_settings=facts.ucx_settings,
    )  # fmt: skip


def facts_from_wire(wire: pb.MachineFacts) -> MachineFacts:
    return MachineFacts(
        machine_id=wire.machine_id, num_cpus=wire.num_cpus, num_gpus=wire.num_gpus, memlock_bytes=wire.memlock_bytes,
        shm=SharedMemory(wire.shm_bytes, wire.shm_free_bytes, wire.is_shm_writable),
        namespaces=Namespaces(wire.ipc_namespace, wire.pid_namespace, wire.network_namespace),
        has_rdma=wire.has_rdma, ucx_settings=tuple(wire.ucx_settings), num_cuda_devices=wire.num_cuda_devices,
        has_compiled_kernels=wire.has_compiled_kernels, transport=wire.transport, transport_version=wire.transport_version,
    )  # fmt: skip


def _shared_memory(path: str) -> SharedMemory:
    try:
        room = os.statvfs(path)
    except OSError:
        return SharedMemory()
    try:
        with tempfile.TemporaryFile(dir=path):
            is_writable = True
    except OSError:
        is_writable = False
    return SharedMemory(room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize, is_writable)


def _namespace(name: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{name}").st_ino
    except OSError:
        return 0


def _num_gpus(visible: str | None) -> int:
    """Device files of NVIDIA GPUs that this process may open, or fewer when CUDA_VISIBLE_DEVICES names fewer."""
    files = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name) and os.access(path, os.R_OK)]
    if visible is None:
        return len(files)
    return min(len(files), len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))
