"""Workers that start: in any order, of another version, with other weights, or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from splitfire.cli.supervisor import free_port
from splitfire.core.fingerprint import PROTOCOL_MAJOR, PROTOCOL_MINOR
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.checkpoints import PICO, ROOT
from tests.e2e.fleets import greedy, refusal_of, until
from tests.faults.proc.sick import VERSION
from tests.faults.proc.sick_fleet import NOT_SERVING, Ground, Watched, health_of, some_of_each


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process by hand, ended afterwards."""
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, stderr=out, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def joining(ground: Ground, name: str) -> Sequence[str]:
    """Flags of one more worker of this fleet."""
    fleet = ground.fleet.fleet
    ports = ground.fleet.status().worker_ports
    token = fleet.directory / "fleet-token"
    return ("--role=decode", f"--worker-id={name}", f"--router={','.join(ports)}", f"--fleet-token-file={token}", "--dtype=fp32")


NEWER_MINOR = f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR + 1}"
OTHER_MAJORS = [f"{PROTOCOL_MAJOR + 1}.0", f"{PROTOCOL_MAJOR - 1}.0"]


@pytest.mark.parametrize("version", OTHER_MAJORS)
def test_a_worker_of_another_major_version_is_told_both(
    ground: Ground, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F65: refused for good, exit 2. The fleet does not mind."""
    ground.heal()
    monkeypatch.setenv(VERSION, version)
    log = tmp_path / "log"
    with started(log, "tests.faults.proc.sick", "splitfire.worker", *joining(ground, "other")) as process:
        assert process.wait(60) == 2
    assert f"speaks protocol {version}" in log.read_text()
    assert f"this router {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}" in log.read_text()
    assert len(ground.fleet.ids(count=4)) == 4


def test_a_worker_of_another_minor_version_is_one_of_us(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F65: it joins, meets the others, and has its share of the work."""
    ground.heal()
    monkeypatch.setenv(VERSION, NEWER_MINOR)
    with started(tmp_path / "log", "tests.faults.proc.sick", "splitfire.worker", *joining(ground, "newer")):
        until(lambda: any(p.decode_worker_id == "newer" for p in ground.fleet.status().pairs), 60)
        watched = Watched(ground.fleet, some_of_each(12, 100))
        until(lambda: ground.fleet.worker("newer").running_sequences)
        watched.assert_right()
    until(lambda: all(w.worker_id != "newer" for w in ground.fleet.status().workers))


def test_weight_digest_mismatch(ground: Ground, tmp_path: Path) -> None:
    """F67: one bit of one weight is another."""
    ground.heal()
    model = Path(shutil.copytree(PICO, tmp_path / "pico"))
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    log = tmp_path / "log"
    with started(log, "splitfire.worker", f"--model={model}", *joining(ground, "other")) as process:
        assert process.wait(60) == 2
    assert "weights" in log.read_text()
    assert len(ground.fleet.status().workers) == 5
    assert len(ground.fleet.ids(count=4)) == 4


def test_worker_fails_to_load(tmp_path: Path) -> None:
    """F74: it never registers, and ends with its one line; the router says which role is missing, to clients and to probes."""
    port, worker_port = free_port(), free_port()
    with started(tmp_path / "router", "router", f"--port={port}", f"--worker-port={worker_port}"):
        until(lambda: '"ready"' in (tmp_path / "router").read_text(), 60)
        flags = (f"--router=127.0.0.1:{worker_port}", "--kv-memory=1MiB")
        with started(tmp_path / "worker", "splitfire.worker", *flags) as worker:
            assert worker.wait(60) == 2
        assert "splitfire: kv_memory is 1048576 bytes" in (tmp_path / "worker").read_text()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert not stub.GetFleet(pb.GetFleetRequest(), timeout=5).workers
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(greedy(), timeout=10))
            refusal = refusal_of(caught.value)
            assert (refusal.code, refusal.reason, refusal.is_retryable) == (grpc.StatusCode.UNAVAILABLE, "no_decode", True)
            assert health_of(f"127.0.0.1:{port}") == NOT_SERVING


@pytest.mark.parametrize("order", list(itertools.permutations(["router", "prefill", "decode"])), ids="-".join)
def test_start_order_permutations(order: tuple[str, ...], tmp_path: Path) -> None:
    """F73: each is started when the one before says that it is ready; all find one another, nobody is started twice."""
    port, worker_port = free_port(), free_port()
    shared = (f"--router=127.0.0.1:{worker_port}", "--threads=1", "--dtype=fp32")
    commands = {
        "router": ("router", f"--port={port}", f"--worker-port={worker_port}", "--split=always"),
        "prefill": ("splitfire.worker", "--role=prefill", "--worker-id=prefill", *shared),
        "decode": ("splitfire.worker", "--role=decode", "--worker-id=decode", *shared),
    }
    with started_in(order, commands, tmp_path), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        until(lambda: len(stub.GetFleet(pb.GetFleetRequest(), timeout=5).pairs) == 1, 30)
        messages = list(stub.Generate(greedy(count=5), timeout=30))
        assert messages[-1].summary.kv_transfer.bytes > 0
        assert sum(len(m.token_ids) for m in messages) == 5


@contextmanager
def started_in(order: Sequence[str], commands: dict[str, tuple[str, ...]], tmp_path: Path) -> Iterator[None]:
    first, *others = order
    with started(tmp_path / first, *commands[first]) as process:
        until(lambda: '"ready"' in (tmp_path / first).read_text(), 60)
        if others:
            with started_in(others, commands, tmp_path):
                yield
                assert process.poll() is None
        else:
            yield
            assert process.poll() is None, os.fspath(tmp_path / first)
