"""One project of compose.yaml on this machine, with ports of its own, and hands to hurt its containers with. What .env.example says holds."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from splitfire.cli.supervisor import free_ports
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.checkpoints import ROOT
from tests.e2e.fleets import until

HERE = Path(__file__).parent
FIXED = HERE / "fixed.yaml"
READY_S = 60.0
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
COMPOSE = ("docker-compose",) if shutil.which("docker-compose") else ("docker", "compose")
ENGINE = Path("/var/run/docker.sock")


def run(*command: str, timeout: float = 120.0, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
    """Both of its outputs; what it said is in the error when it fails."""
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False, cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert ran.returncode == 0 or not check, f"{' '.join(command)}: {ran.stdout}"
    return ran.stdout


class Container:
    """One of the engine's."""

    def __init__(self, container_id: str) -> None:
        self.id = container_id

    def inspect(self) -> dict[str, Any]:
        [found] = json.loads(run("docker", "inspect", self.id))
        return dict(found)

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.inspect()["State"])

    @property
    def num_restarts(self) -> int:
        """By its restart policy."""
        return int(self.inspect()["RestartCount"])

    @property
    def pid(self) -> int:
        """Of its first process, as this machine counts."""
        return int(self.state["Pid"])

    def execute(self, *command: str, timeout: float = 60.0) -> tuple[int, str]:
        """In the container: exit code, and what it said. An engine has been seen to wait for ever where the container ended meanwhile."""
        try:
            ran = subprocess.run(
                ("docker", "exec", self.id, *command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 1, f"no answer from the engine within {timeout:g} s"
        return ran.returncode, ran.stdout

    def is_well(self) -> tuple[bool, str]:
        """What its health check says, asked now."""
        code, said = self.execute("python", "-I", "-S", "/app/deploy/health.py", timeout=20)
        return code == 0, said.strip()

    def logs(self) -> str:
        return run("docker", "logs", self.id)

    def cpu_s(self) -> float:
        """Processor time so far, of everything that ran in it."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(ENGINE))
        with contextlib.closing(connection):
            connection.request("GET", f"/containers/{self.id}/stats?stream=false&one-shot=true")
            return float(json.load(connection.getresponse())["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9


class Node:
    """Nothing of it is left after `down`."""

    def __init__(self, profiles: Sequence[str], files: Sequence[Path] = (FIXED,), **environment: str) -> None:
        self.project = f"splitfire-test-{secrets.token_hex(3)}"
        self.profiles = profiles
        self.port, self.http_port = free_ports(2, but=0)
        self.environment = {"SPLITFIRE_PORT": str(self.port), "SPLITFIRE_HTTP_PORT": str(self.http_port), **environment}
        self.files = [ROOT / "compose.yaml", *files]

    @property
    def address(self) -> str:
        """Of gRPC, published."""
        return f"127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """`docker compose` for this project, with its profiles."""
        command = [*COMPOSE, "--env-file", ".env.example", "--project-name", self.project, "--project-directory", str(ROOT)]
        command += [word for file in self.files for word in ("--file", str(file))]
        return command + [word for profile in self.profiles for word in ("--profile", profile)]

    def compose(self, *arguments: str, timeout: float = 180.0, check: bool = True) -> str:
        return run(*self.command, *arguments, timeout=timeout, check=check, environment=self.environment)

    def containers(self, service: str) -> list[Container]:
        return [Container(line) for line in self.compose("ps", "-a", "-q", service).split() if re.fullmatch(r"[0-9a-f]{64}", line)]

    def container(self, service: str) -> Container:
        [only] = self.containers(service)
        return only

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5", check=False)

    def stub(self, address: str = "") -> inference_pb2_grpc.InferenceStub:
        """Over a connection of its own."""
        return inference_pb2_grpc.InferenceStub(grpc.insecure_channel(address or self.address, OWN_CONNECTION))

    def status(self) -> pb.GetFleetResponse:
        """Empty while nobody answers."""
        with grpc.insecure_channel(self.address, OWN_CONNECTION) as channel, contextlib.suppress(grpc.RpcError):
            return inference_pb2_grpc.InferenceStub(channel).GetFleet(pb.GetFleetRequest(), timeout=5)
        return pb.GetFleetResponse()

    def workers(self) -> Mapping[str, str]:
        """Who is attached: their incarnations, by name."""
        return {worker.worker_id: worker.incarnation for worker in self.status().workers}

    def wait_whole(self, num_workers: int = 2, num_pairs: int = 1) -> None:
        """So many workers, and every pair measured."""

        def is_whole() -> bool:
            status = self.status()
            return len(status.workers) == num_workers and len(status.pairs) == num_pairs

        until(is_whole, READY_S, lambda: f"{self.status()}\n{self.compose('logs', '--tail=20')}")

    def is_quiet(self) -> bool:
        """Nobody holds a block, a slot or a request."""
        status = self.status()
        held = [w for w in status.workers if w.free_blocks != w.total_blocks or w.held_slots or w.running_sequences]
        return bool(status.workers) and not (held or status.running_requests or status.queued_requests)

    def worker_in(self, container: Container) -> str:
        """The name of the worker that runs in it, from its log."""
        ready = [line for line in container.logs().splitlines() if '"event": "ready"' in line]
        return str(json.loads(ready[-1])["worker_id"])


@contextmanager
def up(*services: str, profiles: Sequence[str] = ("cpu",), files: Sequence[Path] = (FIXED,), **environment: str) -> Iterator[Node]:
    """A node that was brought up, with whatever flags `up` is given among `services`."""
    node = Node(profiles, files, **environment)
    try:
        node.compose("up", "--detach", *services)
        yield node
    finally:
        node.down()
