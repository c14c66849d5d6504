"""Judging is pure: facts in, findings out. Every row is something that is wrong with a machine or a pair."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from splitfire.cli.doctor import diagnosis_of
from splitfire.cli.doctor_view import as_json, print_diagnosis
from splitfire.cli.findings import (
    Diagnosis,
    DigestCost,
    Finding,
    Member,
    PairReading,
    Unmeasured,
    allows_shared_memory,
    exit_code,
    judge,
)
from splitfire.core.machine import UNLIMITED, MachineFacts, Namespaces, SharedMemory, facts_to_wire
from splitfire.v1 import inference_pb2 as pb

GIB = 1 << 30
FACTS = MachineFacts(
    machine_id="m1", num_cpus=2, num_gpus=0, memlock_bytes=8 << 20, shm=SharedMemory(GIB, GIB, True), namespaces=Namespaces(1, 2, 3),
    has_rdma=False, has_compiled_kernels=True, transport="ucx", transport_version="1.21.0",
)  # fmt: skip
PAIR = PairReading(
    "p0", "d0", "ucx", "shared memory", round_trip_s=5e-6, round_trip_p99_s=5e-5, bytes_per_s=8e9, memcpy_bytes_per_s=16e9,
    is_same_machine=True,
)  # fmt: skip


def diagnosis(p0: MachineFacts = FACTS, d0: MachineFacts = FACTS, **changes: Any) -> Diagnosis:
    members = (Member("p0", "prefill", p0), Member("d0", "decode", d0))
    return replace(Diagnosis(members, (PAIR,), num_cpus=2, load=0.5), **changes)


def both(**changes: Any) -> Diagnosis:
    facts = replace(FACTS, **changes)
    return diagnosis(facts, facts)


def test_a_pair_over_shared_memory_is_in_order() -> None:
    assert judge(diagnosis()) == []
    assert exit_code([]) == 0
    assert PAIR.ratio == 0.5


SLOW = replace(PAIR, path="network", bytes_per_s=9e8)


@pytest.mark.parametrize(
    ("ill", "what", "fix", "serious"),
    [
        (diagnosis(pairs=(SLOW,)), "goes over the network", "UCX_PROTO_INFO=y", True),
        (
            replace(both(ucx_settings=("UCX_TLS=tcp",)), pairs=(SLOW,)),
            "goes over the network",
            "p0 and d0 had UCX_TLS=tcp",
            True,
        ),
        (
            diagnosis(d0=replace(FACTS, namespaces=Namespaces(1, 9, 9)), pairs=(SLOW,)),
            "goes over the network",
            "pid and network namespaces",
            True,
        ),
        (diagnosis(pairs=(replace(SLOW, transport="tcp"),)), "goes over the network", "--transport ucx", True),
        (diagnosis(pairs=(), unmeasured=(Unmeasured("p0", "d0", "silence"),)), "could not be measured", "UCX_PROTO_INFO=y", True),
        (
            diagnosis(d0=replace(FACTS, machine_id="m2"), pairs=(), unmeasured=(Unmeasured("p0", "d0", "silence"),)),
            "could not be measured",
            "--ucx-devices",
            True,
        ),
        (
            diagnosis(pairs=(), unmeasured=(Unmeasured("p0", "d0", "ended with code 2", "correct it"),)),
            "could not be measured",
            "correct it",
            True,
        ),
        (diagnosis(pairs=(replace(PAIR, age_s=60.0),)), "did not answer now", "splitfire fleet", True),
        (diagnosis(pairs=(replace(PAIR, bytes_per_s=5e7),)), "only 50 MB/s", "--cpus", True),
        (diagnosis(pairs=(replace(PAIR, bytes_per_s=4e8),)), "of what memcpy does", "look who else", False),
        (both(shm=SharedMemory()), "there is no /dev/shm", "tmpfs", True),
        (both(shm=SharedMemory(GIB, GIB, False)), "cannot be written to", "tmpfs", True),
        (both(shm=SharedMemory(64 << 20, 1 << 20, True)), "1 MiB free of 64, 32 MiB are needed", "--shm-size", True),
        (both(has_rdma=True), "locked memory is 8 MiB, 64 MiB are needed", "ulimit -l", True),
        (both(num_gpus=2), "none of 2 GPUs", "CUDA build", False),
        (both(has_compiled_kernels=False), "compiled kernels", "g++", False),
        (diagnosis(num_cpus=1, load=0.1), "share one processor", "two", False),
        (diagnosis(load=7.0), "7.0 processes want 2 processors", "quiet", False),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(ill: Diagnosis, what: str, fix: str, serious: bool) -> None:
    [finding] = judge(ill)
    assert what in finding.what
    assert finding.why
    assert fix in finding.fix
    assert exit_code([finding]) == int(serious)
    assert "\n" not in finding.what + finding.why + finding.fix


@pytest.mark.parametrize(
    "well",
    [
        both(has_rdma=True, memlock_bytes=UNLIMITED),
        both(num_gpus=2, num_cuda_devices=2),
        both(shm=SharedMemory(), transport="tcp"),  # it needs none
        diagnosis(d0=replace(FACTS, namespaces=Namespaces(0, 2, 3))),  # unknown is not different
        diagnosis(d0=replace(FACTS, machine_id="m2"), pairs=(replace(SLOW, is_same_machine=False),)),
        diagnosis(num_cpus=None, load=None),
    ],
)
def test_what_is_right_is_not_complained_about(well: Diagnosis) -> None:
    assert judge(well) == []


def test_the_loud_come_first() -> None:
    ill = replace(both(has_compiled_kernels=False, shm=SharedMemory()), pairs=(SLOW,))
    assert [finding.is_serious for finding in judge(ill)] == [True, True, False]
    assert "network" in judge(ill)[0].what


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("all", True), ("shm", True), ("posix,tcp", True), ("sm,self", True), ("tcp", False), ("rc,self", False), ("^tcp", True),
        ("^shm", False), ("^sm,tcp", False), ("^posix", True), ("^posix,sysv", False), ("\\posix", True), ("cma", False),
    ],
)  # fmt: skip
def test_which_values_of_ucx_tls_leave_shared_memory_in(value: str, allowed: bool) -> None:
    assert allows_shared_memory(value) is allowed


def test_what_digests_cost() -> None:
    cost = DigestCost(with_s_per_byte=0.3e-9, without_s_per_byte=0.2e-9)
    assert round(cost.ms_per_gb) == 100
    assert round(cost.share_of(PAIR), 3) == 0.8  # a GB takes 125 ms
    assert DigestCost(0.1e-9, 0.2e-9).ms_per_gb == 0  # noise


def shown(ill: Diagnosis, findings: list[Finding]) -> list[str]:
    text = StringIO()
    print_diagnosis(Console(file=text, width=80, soft_wrap=True), ill, findings)
    return text.getvalue().splitlines()


def test_a_network_between_workers_of_one_machine_is_the_first_line() -> None:
    ill = diagnosis(pairs=(PAIR, SLOW))
    lines = shown(ill, judge(ill))
    assert lines[0] == "NETWORK between two workers of one machine: p0 → d0, 0.90 GB/s"
    assert [line.split(":")[0].strip() for line in lines[-2:]] == ["why", "do"]


def test_the_table_fits_80_columns() -> None:
    pair = replace(PAIR, prefill="prefill-0", decode="decode-10")
    lines = shown(diagnosis(pairs=(pair,)), [])
    assert all(len(line) <= 80 for line in lines[:2])
    assert " ".join(lines[1].split()) == "prefill-0 → decode-10 ucx, shared memory 5 µs 50 µs 8.00 16.0 50%"
    assert lines[-1] == "nothing is wrong"


def test_json_says_the_same() -> None:
    ill = diagnosis(pairs=(SLOW,), digest=DigestCost(2e-10, 1e-10))
    said = as_json(ill, judge(ill))
    assert said["ok"] is False
    assert said["findings"][0]["is_serious"] is True
    assert said["pairs"][0]["path"] == "network"
    assert said["pairs"][0]["ratio_to_memcpy"] == SLOW.ratio
    assert round(said["digest"]["ms_per_gb"]) == 100
    assert said["members"][1]["facts"]["shm"]["is_writable"] is True


def test_a_fleet_becomes_a_diagnosis_with_what_is_missing() -> None:
    status = pb.GetFleetResponse()
    for name, role in (("d1", pb.ROLE_DECODE), ("d0", pb.ROLE_DECODE), ("p0", pb.ROLE_PREFILL)):
        status.workers.add(worker_id=name, role=role, machine=facts_to_wire(FACTS))
    status.pairs.add(
        prefill_worker_id="p0", decode_worker_id="d0", transport="ucx", path="shared memory", round_trip_s=5e-6,
        round_trip_p99_s=5e-5, bytes_per_s=8e9, memcpy_bytes_per_s=16e9, is_same_machine=True,
    )  # fmt: skip
    found = diagnosis_of(status)
    assert found.pairs == (PAIR,)
    assert found.members[0] == Member("p0", "prefill", FACTS)
    assert [(pair.prefill, pair.decode) for pair in found.unmeasured] == [("p0", "d1")]
    assert exit_code(judge(found)) == 1
