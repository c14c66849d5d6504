"""What `splitfire doctor` found out, and what follows from it. Pure: facts in, findings out.

A finding is serious when it makes the hand-off slow or impossible; the others are worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from splitfire.core.machine import NETWORK, SHARED_MEMORY, SHM, UNLIMITED, MachineFacts

MIB = 1 << 20
MIN_SHM_FREE = 32 * MIB  # UCX's queues and the pieces it copies through; a fleet of a few workers
MIN_MEMLOCK = 64 * MIB  # with RDMA the rings are locked: 24 MiB a peer by default
SLOW_BYTES_PER_S = 125e6  # a gigabit Ethernet; less makes a hand-off longer than computing most prompts
LOW_RATIO = 0.05  # of memcpy, over shared memory
STALE_S = 10.0  # what is older was not measured when asked
SHARED_MEMORY_NAMES = frozenset({"all", "shm", "sm", "posix", "sysv"})  # in UCX_TLS


@dataclass(frozen=True, slots=True)
class Member:
    """A worker, or an end of the pair that was started for the occasion."""

    name: str
    role: str
    facts: MachineFacts


@dataclass(frozen=True, slots=True)
class PairReading:
    """What was measured between two members."""

    prefill: str
    decode: str
    transport: str
    path: str
    round_trip_s: float
    round_trip_p99_s: float
    bytes_per_s: float
    memcpy_bytes_per_s: float
    is_same_machine: bool
    age_s: float = 0.0

    @property
    def ratio(self) -> float:
        """Of the rate to that of memcpy; 0 when that is not known."""
        return self.bytes_per_s / self.memcpy_bytes_per_s if self.memcpy_bytes_per_s else 0.0

    @property
    def is_loud(self) -> bool:
        return self.is_same_machine and self.path == NETWORK


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A pair that did not answer. `fix` when the reason says what to do."""

    prefill: str
    decode: str
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class DigestCost:
    """Of pack and unpack together."""

    with_s_per_byte: float
    without_s_per_byte: float

    @property
    def ms_per_gb(self) -> float:
        return max(0.0, self.with_s_per_byte - self.without_s_per_byte) * 1e12

    def share_of(self, pair: PairReading) -> float:
        """Of the time the bytes are on their way; more than 1 when digests take longer than that."""
        return self.ms_per_gb / 1e12 * pair.bytes_per_s


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was looked at. `num_cpus` and `load` are of this machine, when the pair was started here."""

    members: tuple[Member, ...]
    pairs: tuple[PairReading, ...]
    unmeasured: tuple[Unmeasured, ...] = ()
    digest: DigestCost | None = None
    num_cpus: int | None = None
    load: float | None = None

    def facts(self, name: str) -> MachineFacts | None:
        return next((member.facts for member in self.members if member.name == name), None)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: a line each."""

    what: str
    why: str
    fix: str
    is_serious: bool


def judge(diagnosis: Diagnosis) -> list[Finding]:
    """The loudest first."""
    loud = [_network(diagnosis, pair) for pair in diagnosis.pairs if pair.is_loud]
    found = [*_unmeasured(diagnosis), *_slow(diagnosis), *_machines(diagnosis), *_here(diagnosis)]
    return loud + sorted(found, key=lambda finding: not finding.is_serious)


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.is_serious for finding in findings))


def allows_shared_memory(ucx_tls: str) -> bool:
    """Whether a value of UCX_TLS leaves the shared-memory transports in; `^` before it means all but these."""
    names = {name.strip().lstrip("\\").split(":")[0] for name in ucx_tls.lstrip("^").split(",")}
    if ucx_tls.startswith("^"):
        return not (names & {"shm", "sm"} or {"posix", "sysv"} <= names)
    return bool(names & SHARED_MEMORY_NAMES)


def _network(diagnosis: Diagnosis, pair: PairReading) -> Finding:
    """Two workers of one machine, and their KV does not take the way it could."""
    ratio = f", {pair.ratio:.0%} of what memcpy does" if pair.ratio else ""
    return Finding(
        f"KV from {pair.prefill} to {pair.decode} goes over the network, though both are on one machine",
        f"{pair.bytes_per_s / 1e9:.2f} GB/s{ratio}; shared memory moves several times as much with less work",
        "; ".join(_causes(diagnosis, pair.prefill, pair.decode, pair.transport)),
        is_serious=True,
    )


def _causes(diagnosis: Diagnosis, prefill: str, decode: str, transport: str) -> list[str]:
    """What to do about shared memory that is not used between two members, by what is known of them."""
    ends = {name: facts for name in (prefill, decode) if (facts := diagnosis.facts(name)) is not None}
    if transport == "tcp":
        return ["the transport is tcp: use --transport ucx (SPLITFIRE_TRANSPORT=ucx), the default"]
    causes = []
    blocked: dict[str, list[str]] = {}
    for name, facts in ends.items():
        for setting in facts.ucx_settings:
            variable, _, value = setting.partition("=")
            if variable == "UCX_TLS" and not allows_shared_memory(value):
                blocked.setdefault(setting, []).append(name)
        if not facts.shm.is_writable:
            causes.append(f"give {name} a {SHM} that it can write to")
    causes += [f"unset UCX_TLS or add shm to it: {' and '.join(names)} had {setting}" for setting, names in blocked.items()]
    if len(ends) == 2 and (differing := ends[prefill].namespaces.differing(ends[decode].namespaces)):
        names = " and ".join(differing)
        causes.append(f"let the containers share their {names} namespace{'s' if len(differing) > 1 else ''} (docs/decisions/0011)")
    return causes or ["run the workers with UCX_PROTO_INFO=y UCX_LOG_LEVEL=info: UCX then says which transports it takes, and why"]


def _unmeasured(diagnosis: Diagnosis) -> Iterator[Finding]:
    for pair in diagnosis.unmeasured:
        ends = [diagnosis.facts(name) for name in (pair.prefill, pair.decode)]
        is_same_machine = None not in ends and ends[0].machine_id == ends[1].machine_id  # type: ignore[union-attr]
        if pair.fix:
            fix = pair.fix
        elif is_same_machine:
            fix = "; ".join(_causes(diagnosis, pair.prefill, pair.decode, "ucx"))
        else:
            fix = "both workers' logs say more; on several machines --ucx-devices must name devices of one network"
        yield Finding(f"{pair.prefill} and {pair.decode} could not be measured", pair.reason, fix, is_serious=True)
    for pair_read in diagnosis.pairs:
        if pair_read.age_s > STALE_S:
            yield Finding(
                f"{pair_read.prefill} and {pair_read.decode} did not answer now",
                f"what is shown was measured {pair_read.age_s:.0f} s ago",
                "look whether one of them is stopped, or too busy: splitfire fleet",
                is_serious=True,
            )


def _slow(diagnosis: Diagnosis) -> Iterator[Finding]:
    for pair in diagnosis.pairs:
        name = f"{pair.prefill} → {pair.decode}"
        if pair.bytes_per_s < SLOW_BYTES_PER_S and not pair.is_loud:
            yield Finding(
                f"{name} moves only {pair.bytes_per_s / 1e6:.0f} MB/s",
                "handing a prompt over may take longer than computing it",
                "give the workers processors of their own (--cpus), or a faster network",
                is_serious=True,
            )
        elif pair.path == SHARED_MEMORY and 0 < pair.ratio < LOW_RATIO:
            yield Finding(
                f"{name} moves {pair.ratio:.0%} of what memcpy does",
                "over shared memory half of it is usual",
                "look who else uses the processors and the memory",
                is_serious=False,
            )


def _machines(diagnosis: Diagnosis) -> Iterator[Finding]:
    seen = set()
    for member in diagnosis.members:
        for finding in _machine(member.facts):
            if finding.what not in seen:
                seen.add(finding.what)
                yield finding


def _machine(facts: MachineFacts) -> Iterator[Finding]:
    is_ucx, shm = facts.transport != "tcp", facts.shm
    if is_ucx and not shm.is_writable:
        what = f"{SHM} cannot be written to" if shm.num_bytes else f"there is no {SHM}"
        why = "UCX's shared memory is made there; without it KV goes over the network"
        yield Finding(what, why, f"mount a tmpfs on {SHM}, in containers with --shm-size", is_serious=True)
    elif is_ucx and shm.free_bytes < MIN_SHM_FREE:
        what = f"{SHM} has {shm.free_bytes // MIB} MiB free of {shm.num_bytes // MIB}, {MIN_SHM_FREE // MIB} MiB are needed"
        why = "UCX fails, or takes the network, when it is full"
        yield Finding(what, why, "remove what others left there, or make it larger (containers: --shm-size 1g)", is_serious=True)
    if is_ucx and facts.has_rdma and facts.memlock_bytes < MIN_MEMLOCK:
        what = f"the limit of locked memory is {facts.memlock_bytes // MIB} MiB, {MIN_MEMLOCK // MIB} MiB are needed"
        why = "there is RDMA, and what cannot be locked is sent over TCP"
        yield Finding(what, why, "ulimit -l unlimited (containers: --ulimit memlock=-1)", is_serious=True)
    if facts.num_gpus and not facts.num_cuda_devices:
        what = f"PyTorch can use none of {facts.num_gpus} GPUs"
        yield Finding(what, "models run on the CPU", "install a CUDA build of PyTorch that fits the driver", is_serious=False)
    if not facts.has_compiled_kernels:
        what, why = (
            "the compiled kernels were not built",
            "packing and digests of KV run in torch, which takes several times as long",
        )
        yield Finding(what, why, "install a C++ compiler (Debian: apt install g++), remove .venv, scripts/setup", is_serious=False)


def _here(diagnosis: Diagnosis) -> Iterator[Finding]:
    num_cpus, load = diagnosis.num_cpus, diagnosis.load
    if num_cpus == 1:
        why = "every message waits until the other end is scheduled; nothing overlaps"
        yield Finding("prefill and decode share one processor", why, "give them two, or use --aggregated", is_serious=False)
    if num_cpus is not None and load is not None and load > num_cpus:
        what = f"the machine is busy: {load:.1f} processes want {num_cpus} processors"
        yield Finding(what, "the numbers are lower than the machine's", "run it again when it is quiet", is_serious=False)


def describe_memlock(num_bytes: int) -> str:
    return "unlimited" if num_bytes == UNLIMITED else f"{num_bytes // MIB} MiB"
