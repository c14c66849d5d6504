"""How a diagnosis looks: a table, lines for machines and findings on a terminal; the same content as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitfire.cli.findings import Diagnosis, DigestCost, Finding, PairReading, describe_memlock, exit_code
from splitfire.core.machine import SHM, MachineFacts


def as_json(diagnosis: Diagnosis, findings: list[Finding]) -> dict[str, Any]:
    """Units are in the names."""
    digest = diagnosis.digest
    return {
        "ok": exit_code(findings) == 0,
        "findings": [asdict(finding) for finding in findings],
        "pairs": [{**asdict(pair), "ratio_to_memcpy": pair.ratio} for pair in diagnosis.pairs],
        "unmeasured": [asdict(pair) for pair in diagnosis.unmeasured],
        "digest": {**asdict(digest), "ms_per_gb": digest.ms_per_gb} if digest is not None else None,
        "members": [asdict(member) for member in diagnosis.members],
        "num_cpus": diagnosis.num_cpus,
        "load": diagnosis.load,
    }


def print_diagnosis(console: Console, diagnosis: Diagnosis, findings: Sequence[Finding]) -> None:
    """What is loud comes first, in red."""
    for pair in diagnosis.pairs:
        if pair.is_loud:
            line = f"NETWORK between two workers of one machine: {pair.prefill} → {pair.decode}, {pair.bytes_per_s / 1e9:.2f} GB/s"
            console.print(escape(line), style="bold red")
    if diagnosis.pairs:
        console.print(pair_table(diagnosis.pairs))
    if diagnosis.digest is not None:
        console.print(digest_line(diagnosis.digest, diagnosis.pairs))
    machines: dict[str, list[str]] = {}
    for member in diagnosis.members:
        machines.setdefault(machine_line(member.facts), []).append(member.name)
    for line, names in machines.items():
        console.print(escape(f"{', '.join(names)}: {line}"))
    if diagnosis.num_cpus is not None:
        console.print(f"this machine: {diagnosis.num_cpus} CPUs to use, load {diagnosis.load or 0.0:.1f}")
    for finding in findings:
        console.print()
        mark, style = ("✗", "bold red") if finding.is_serious else ("!", "bold yellow")
        console.print(escape(f"{mark} {finding.what}"), style=style)
        console.print(escape(f"  why: {finding.why}"))
        console.print(escape(f"  do:  {finding.fix}"))
    if not findings:
        console.print("\nnothing is wrong", style="green")


def pair_table(pairs: Sequence[PairReading]) -> Table:
    """Fits 80 columns when ids are short."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("pair", no_wrap=True)
    table.add_column("KV by", no_wrap=True)
    for title in ("round trip", "p99", "GB/s", "memcpy", "of it"):
        table.add_column(title, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(
            f"{pair.prefill} → {pair.decode}",
            f"{pair.transport}, {pair.path}",
            f"{pair.round_trip_s * 1e6:.0f} µs",
            f"{pair.round_trip_p99_s * 1e6:.0f} µs",
            f"{pair.bytes_per_s / 1e9:.2f}",
            f"{pair.memcpy_bytes_per_s / 1e9:.1f}" if pair.memcpy_bytes_per_s else "-",
            f"{pair.ratio:.0%}" if pair.ratio else "-",
            style="bold red" if pair.is_loud else None,
        )
    return table


def digest_line(digest: DigestCost, pairs: Sequence[PairReading]) -> str:
    share = "".join(f", {digest.share_of(pair):.0%} of the time a GB is on its way" for pair in pairs[:1])
    return (
        f"digests: {digest.ms_per_gb:.0f} ms a GB{share} (pack and unpack: {digest.with_s_per_byte * 1e12:.0f} ms a GB with, "
        f"{digest.without_s_per_byte * 1e12:.0f} without)"
    )


def machine_line(facts: MachineFacts) -> str:
    """One process's view of its machine."""
    shm, spaces = facts.shm, facts.namespaces
    access = "" if shm.is_writable else ", not writable"
    room = f"{SHM} {size(shm.num_bytes)} ({size(shm.free_bytes)} free{access})" if shm.num_bytes else f"no {SHM}"
    gpus = f"{facts.num_gpus} GPUs, {facts.num_cuda_devices} usable" if facts.num_gpus or facts.num_cuda_devices else "no GPU"
    settings = " ".join(facts.ucx_settings) or "UCX_TLS and UCX_NET_DEVICES not set"
    kernels = "compiled kernels" if facts.has_compiled_kernels else "no compiled kernels"
    return (
        f"{facts.transport} {facts.transport_version}, {settings}; {kernels}; {facts.num_cpus} CPU{'s' * (facts.num_cpus != 1)}; {gpus}; "
        f"memlock {describe_memlock(facts.memlock_bytes)}; {room}; {'RDMA' if facts.has_rdma else 'no RDMA'}; "
        f"namespaces ipc {spaces.ipc}, pid {spaces.pid}, net {spaces.network}"
    )


def size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes >> 20} MiB"
