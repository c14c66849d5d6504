"""`splitfire up` as a person runs it, in processes of its own, and hands to hurt its children with."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil

from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.checkpoints import ROOT
from tests.e2e.fleets import until

READY_S = 90.0
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


class Up:
    """A fleet that is ready. Who dies is started again by `splitfire up`, not by the test."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, num_workers: int) -> None:
        self.address = address  # for clients, of all routers
        self.num_workers = num_workers
        self._process = process
        self._worker_ports = sorted(filter(None, (_worker_port(child) for child in self._children())))  # by router

    def stub(self) -> inference_pb2_grpc.InferenceStub:
        """Over a connection of its own."""
        return inference_pb2_grpc.InferenceStub(grpc.insecure_channel(self.address, OWN_CONNECTION))

    def status(self) -> pb.GetFleetResponse:
        """As one of the routers has it; empty while there is none."""
        with grpc.insecure_channel(self.address, OWN_CONNECTION) as channel, contextlib.suppress(grpc.RpcError):
            return inference_pb2_grpc.InferenceStub(channel).GetFleet(pb.GetFleetRequest(), timeout=5)
        return pb.GetFleetResponse()

    def incarnations(self) -> dict[str, str]:
        """Who is attached, by name."""
        return {w.worker_id: w.incarnation for w in self.status().workers}

    def is_whole(self) -> bool:
        """Every worker is attached, every router listens."""
        return len(self.incarnations()) == self.num_workers and all(map(_listens, self._worker_ports))

    def wait_whole(self) -> None:
        until(self.is_whole, READY_S, lambda: str(self.incarnations()))

    def has_other(self, name: str, process: psutil.Process) -> bool:
        """Another process than this one has the name."""
        found = self.child(name)
        return found is not None and found.pid != process.pid

    def child(self, name: str) -> psutil.Process | None:
        """A worker by its id, `router-0` or `router-1`; None while there is none under that name."""
        for process in self._children():
            port = _worker_port(process)
            if f"--worker-id={name}" in _command(process) or (port and name == f"router-{self._worker_ports.index(port)}"):
                return process
        return None

    def is_quiet(self) -> bool:
        """Nobody holds a block, a slot or a request."""
        status = self.status()
        held = [w for w in status.workers if w.free_blocks != w.total_blocks or w.held_slots or w.running_sequences]
        return bool(status.workers) and not (held or status.running_requests or status.queued_requests)

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def _worker_port(process: psutil.Process) -> int:
    """0: it is no router."""
    return next((int(flag.split("=")[1]) for flag in _command(process) if flag.startswith("--worker-port=")), 0)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def up(prefill: int, decode: int, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Up]:
    """`splitfire up pico`, deterministic (fp32), one thread a worker; nothing of it is left afterwards."""
    command = [sys.executable, "-m", "splitfire.cli", "up", "pico", "--port=0", "--http-port=0", "--dtype=fp32"]
    command += [f"--prefill={prefill}", f"--decode={decode}", *flags]
    variables = {**os.environ, "SPLITFIRE_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory(prefix="splitfire-faults-") as directory:
        said = Path(directory) / "said"
        with said.open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=variables | {"TMPDIR": directory, "COLUMNS": "200"}
            )
        try:
            until(lambda: "Ctrl-C" in said.read_text() or process.poll() is not None, READY_S, said.read_text)
            assert process.poll() is None, said.read_text()
            [address] = re.findall(r"^router +ready +(127\.0\.0\.1:\d+)", said.read_text(), re.MULTILINE)
            yield Up(process, address, prefill + decode)
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(90)
            left = psutil.wait_procs(family, timeout=10)[1]
            assert not left, f"left behind: {left}"
