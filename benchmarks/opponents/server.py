"""Somebody else's server as processes of this machine: started, asked until it is ready, stopped while others are measured, ended.

Whatever an idle server does with its core (an idle NIXL agent uses most of one), it does not do while it is stopped (SIGSTOP). Before
that it has a moment to finish what its clients have cancelled: stopped in the middle of a step, it may find on waking that a deadline
of its own has passed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LOGS = BUILD / "logs"
READY_TIMEOUT_S = 1200.0  # vLLM compiles a new model for minutes, once
STOP_TIMEOUT_S = 20.0
SETTLE_S = 3.0
POLL_S = 0.2
QUIET_PORTS = (20_000, 30_000)
NOT_INHERITED = ("OMP_", "KMP_", "GOMP_", "MKL_", "UCX_", "LD_PRELOAD")  # what would quietly tune an opponent


@dataclass(frozen=True, slots=True)
class Command:
    """One process: what runs, with which variables beside ours, on which processors."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server to be. It is ready when each of `health_ports` says so, and asked at the first of them."""

    name: str
    commands: tuple[Command, ...]
    health_ports: tuple[int, ...]
    model: str  # what requests have to call the model

    @property
    def port(self) -> int:
        return self.health_ports[0]


class ServerFailed(Exception):
    """It ended before it was ready, or never became ready; with the end of its log."""


class Server:
    """A running plan. Use as a context manager; a process group of its own for each command."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        self._processes: list[subprocess.Popen[bytes]] = []
        label = re.sub(r"[^A-Za-z0-9]+", "-", plan.name)
        self._logs = [LOGS / f"{label}-{i}.log" for i in range(len(plan.commands))]

    def __enter__(self) -> Server:
        LOGS.mkdir(parents=True, exist_ok=True)
        try:
            for command, log in zip(self.plan.commands, self._logs, strict=True):
                self._processes.append(_start(command, log))
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def pause(self) -> None:
        time.sleep(SETTLE_S)
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)  # also what a leader left behind
        for process in self._processes:
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        waiting = list(self.plan.health_ports)
        while waiting:
            for process, log in zip(self._processes, self._logs, strict=True):
                if process.poll() is not None:
                    raise ServerFailed(f"{self.plan.name} ended with code {process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.plan.name} is not ready after {READY_TIMEOUT_S:g} s: {_last_line(self._logs[0])}")
            waiting = [port for port in waiting if not _is_healthy(port)]
            time.sleep(POLL_S)


def quiet_port() -> int:
    """A port that is free, and none of those that the kernel gives to outgoing connections: some opponents take minutes to bind theirs."""
    ports = list(range(*QUIET_PORTS))
    random.shuffle(ports)
    for port in ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ServerFailed(f"no port of {QUIET_PORTS} is free")


def _start(command: Command, log: Path) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "-c", ",".join(map(str, command.cpus)), *command.arguments]
    environment = _environment(command.environment)
    with log.open("wb") as file:
        return subprocess.Popen(
            pinned, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd=BUILD
        )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return {**kept, **more}


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1]} ({log.relative_to(ROOT)})" if lines else "it said nothing"


def installed_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of packages in an opponent's environment."""
    code = "import sys; from importlib.metadata import version; print(*(version(p) for p in sys.argv[1:]))"
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    return dict(zip(packages, said.split(), strict=True))
