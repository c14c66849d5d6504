"""`splitfire doctor` for real: a pair of its own, a running fleet, and the metrics that say the same all the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from typing import Any

import psutil
import pytest

from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet, start_fleet, until


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitfire.cli", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, cwd=ROOT, env={**os.environ, **environment}
    )


def said(ran: subprocess.CompletedProcess[str]) -> Any:
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def left_over() -> list[str]:
    return [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]) if "splitfire.worker.doctor" in str(p.info)]


def test_a_pair_of_its_own_takes_shared_memory() -> None:
    ran = doctor("--json")
    assert ran.returncode == 0, ran.stdout
    report = said(ran)
    assert report["ok"] is True
    [pair] = report["pairs"]
    assert (pair["transport"], pair["path"]) == ("ucx", "shared memory")
    assert pair["bytes_per_s"] > 0
    assert pair["ratio_to_memcpy"] > 0
    assert 0 < pair["round_trip_s"] <= pair["round_trip_p99_s"]
    assert report["digest"]["with_s_per_byte"] > 0
    assert [member["role"] for member in report["members"]] == ["prefill", "decode"]
    assert report["members"][0]["facts"]["transport_version"].count(".") == 2
    assert not left_over()


@pytest.mark.long
def test_a_machine_that_is_told_to_use_tcp_is_loud_about_it() -> None:
    ran = doctor(UCX_TLS="tcp")
    assert ran.returncode == 1
    assert ran.stdout.startswith("NETWORK between two workers of one machine: prefill → decode")
    assert "UCX_TLS=tcp" in ran.stdout
    report = said(doctor("--json", UCX_TLS="tcp"))
    assert report["ok"] is False
    assert "unset UCX_TLS" in report["findings"][0]["fix"]


def test_the_tcp_transport_is_measured_by_name() -> None:
    ran = doctor("--json", "--transport=tcp")
    assert ran.returncode == 1
    [pair] = said(ran)["pairs"]
    assert (pair["transport"], pair["path"]) == ("tcp", "network")


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"UCX_TLS": "nonsense"}, "UCX_TLS=nonsense"), ({"SPLITFIRE_BLOK": "1"}, "SPLITFIRE_BLOK")],
)
def test_a_pair_that_cannot_start_is_a_finding(environment: dict[str, str], says: str) -> None:
    ran = doctor(**environment)
    assert ran.returncode == 1
    assert says in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    assert not left_over()


def test_mistakes_are_usage_errors_and_a_server_that_is_not_there_is_not() -> None:
    ran = doctor("--transport=pigeon")
    assert ran.returncode == 2
    assert "ucx" in ran.stderr
    ran = doctor("--json", "--server=127.0.0.1:9")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert "nobody answers" in ran.stderr


def test_every_pair_of_a_running_fleet_is_measured_now(pico: RunningFleet) -> None:
    for _ in range(3):  # where it takes too long, doctor says what was measured before
        report = said(doctor("--json", "--server", pico.address))
        if report["pairs"][0]["age_s"] < 2:
            break
    assert report["ok"] is True
    [pair] = report["pairs"]
    assert (pair["prefill"], pair["decode"], pair["path"]) == ("prefill-0", "decode-0", "shared memory")
    assert pair["is_same_machine"] is True
    assert pair["age_s"] < 2
    assert pair["ratio_to_memcpy"] > 0
    facts = [member["facts"] for member in report["members"]]
    assert facts[0]["namespaces"] == facts[1]["namespaces"]
    assert facts[0]["shm"]["is_writable"] is True
    text = doctor("--server", pico.address).stdout
    assert "prefill-0 → decode-0" in text
    assert "memlock" in text


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def ports_of(process: psutil.Process) -> set[int]:
    family = (process, *process.children(recursive=True))
    connections = [one for member in family for one in member.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert all(one.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for one in connections)
    return {one.laddr.port for one in connections}


def test_a_fleet_with_metrics_listens_once_more_each_and_tells_what_it_did() -> None:
    with start_fleet("pico", decode=2, shared=("--metrics-port=0",)) as fleet:
        listening = {child.name: ports_of(fleet.process(child.name)) for child in fleet.fleet.children}
        assert {name: len(ports) for name, ports in listening.items()} == {
            "router": 3, "prefill-0": 3, "decode-0": 3, "decode-1": 3,
        }  # fmt: skip
        ports = {child.name: metrics_port(child.log.read_text()) for child in fleet.fleet.children}
        assert all(ports[name] in listening[name] for name in ports)
        fleet.ids(count=4)
        until(lambda: 'splitfire_handoff_total{outcome="received",side="send"} 1.0' in scrape(ports["prefill-0"]))
        sent = scrape(ports["prefill-0"])
        for peer in ("decode-0", "decode-1"):
            assert f'splitfire_pair_bytes_per_second{{path="shared memory",peer="{peer}",transport="ucx"}}' in sent
        assert 'splitfire_transfers_open{direction="send"} 0.0' in sent
        assert 'splitfire_ring_slots{direction="send",state="lent"} 0.0' in sent
        received = scrape(ports["decode-0"]) + scrape(ports["decode-1"])
        assert received.count('splitfire_handoff_total{outcome="received",side="receive"} 1.0') == 1
        assert 'splitfire_kv_blocks{state="free"}' in received
        told = scrape(ports["router"])
        assert 'splitfire_workers{role="decode"} 2.0' in told
        assert told.count("splitfire_pair_bytes_per_second{") == 2
        table = doctor("--server", fleet.address).stdout
        assert "prefill-0 → decode-0" in table and "prefill-0 → decode-1" in table


def metrics_port(log: str) -> int:
    [ready] = [entry for line in log.splitlines() if (entry := json.loads(line)).get("event") == "ready"]
    return int(ready["metrics_port"])
