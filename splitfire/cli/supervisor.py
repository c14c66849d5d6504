"""A fleet on this machine: router and workers as child processes, started, watched, restarted, and ended together.

A child that stops before the fleet is ready, or with exit code 2 (a wrong setting), ends the fleet with its own one line;
one that dies later is started again, ever more slowly. Children notice when their supervisor is gone and end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from splitfire.cli.client import Client, ServerError
from splitfire.core.errors import ConfigError
from splitfire.core.flags import PARENT_VARIABLE
from splitfire.v1 import inference_pb2 as pb

READY_TIMEOUT_S = 1800.0  # a large checkpoint takes its time
PAIR_TIMEOUT_S = 10.0
POLL_S = 0.05
FIRST_RESTART_S, MAX_RESTART_S = 1.0, 30.0
STOP_TIMEOUT_S = 70.0  # the longest grace time, and the goodbye after it
OWN_PORTS, PORT_TRIES = range(20_000, 32_000), 100


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What to start. `flags` go to every child, as they are."""

    model: str
    model_name: str
    num_prefill: int
    num_decode: int
    prefill_cpus: tuple[int, ...]
    decode_cpus: tuple[int, ...]
    port: int
    router_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    shared_flags: tuple[str, ...] = ()
    num_routers: int = 1  # they share the port


@dataclass(slots=True)
class Child:
    """One process and what it takes to start it again."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    delay_s: float = FIRST_RESTART_S

    def last_line(self) -> str:
        """The last thing it said, for a person."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        for line in reversed(lines):
            if line.startswith("splitfire: "):
                return line.removeprefix("splitfire: ")
        if not lines:
            return "said nothing"
        with contextlib.suppress(ValueError, AttributeError):
            entry = json.loads(lines[-1])
            return str(entry.get("detail") or entry.get("reason") or entry.get("event"))
        return lines[-1]


@dataclass
class Fleet:
    """The children of one `splitfire up`."""

    plan: FleetPlan
    say: Callable[[str], None]
    directory: Path = field(default_factory=lambda: _new_directory())
    children: list[Child] = field(default_factory=list)
    is_ready: bool = False
    has_lost_child: bool = False
    _worker_ports: list[str] = field(default_factory=list)  # of each router
    _token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.plan.port}"

    def client(self) -> Client:
        """As who operates the fleet."""
        return Client(self.address, self._token.encode())

    def start(self) -> None:
        plan = self.plan
        token_file = self.directory / "fleet-token"
        token_file.touch(mode=0o600)
        token_file.write_text(self._token)
        shared = [f"--model={plan.model}", f"--fleet-token-file={token_file}", *plan.shared_flags]
        name = f"--model-name={plan.model_name}"
        self._worker_ports = [f"127.0.0.1:{port}" for port in free_ports(plan.num_routers, but=plan.port)]
        for index, address in enumerate(self._worker_ports):
            flags = [f"--port={plan.port}", f"--worker-port={address.rpartition(':')[2]}", *plan.router_flags]
            if plan.num_routers > 1:
                flags.append("--share-port")
            self._add(f"router-{index}" if plan.num_routers > 1 else "router", ["-m", "router", *shared, name, *flags])
        for role, count, cpus in (("prefill", plan.num_prefill, plan.prefill_cpus), ("decode", plan.num_decode, plan.decode_cpus)):
            for index, mine in enumerate(share(cpus, count)):
                flags = [
                    f"--role={role}",
                    f"--worker-id={role}-{index}",
                    f"--router={','.join(self._worker_ports)}",
                    *plan.worker_flags,
                ]
                if mine:
                    flags.append(f"--cpus={','.join(map(str, mine))}")
                self._add(f"{role}-{index}", ["-m", "splitfire.worker", *shared, *flags])

    def wait_ready(self) -> pb.GetFleetResponse:
        """Until at every router every worker is attached and every pair measured. ConfigError when a child gives up."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        pairs_deadline: float | None = None
        waiting = set(self._worker_ports)  # of routers that are not ready; one that had the port before us is not among them
        while time.monotonic() < deadline:
            for child in self.children:
                if child.process is not None and child.process.poll() is not None:
                    raise ConfigError(f"{child.name}: {child.last_line()}")
            with contextlib.suppress(ServerError), self.client() as client:  # each time a new connection: to any of the routers
                fleet = client.fleet(timeout_s=1.0)
                if waiting & {*fleet.worker_ports} and len(fleet.workers) == self.plan.num_prefill + self.plan.num_decode:
                    pairs_deadline = pairs_deadline or time.monotonic() + PAIR_TIMEOUT_S
                    if len(fleet.pairs) == self.plan.num_prefill * self.plan.num_decode or time.monotonic() > pairs_deadline:
                        waiting.difference_update(fleet.worker_ports)
                if not waiting:
                    self.is_ready = True
                    return fleet
            time.sleep(POLL_S)
        raise ConfigError(f"not ready after {READY_TIMEOUT_S:g} s; the logs are in {self.directory}")

    def watch(self) -> None:
        """One look at the children: who died is started again, unless it said that it never can work."""
        now = time.monotonic()
        for child in self.children:
            if child.restart_at is not None:
                if now >= child.restart_at:
                    child.restart_at = None
                    self._spawn(child)
            elif child.process is not None and (code := child.process.poll()) is not None:
                self.has_lost_child = True
                if code == 2:
                    raise ConfigError(f"{child.name}: {child.last_line()}")
                if now - child.started_at > MAX_RESTART_S:  # it was well for a while
                    child.delay_s = FIRST_RESTART_S
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} ({child.last_line()})"
                self.say(f"{child.name} {how}; starting it again in {child.delay_s:g} s")
                child.restart_at = now + child.delay_s
                child.delay_s = min(child.delay_s * 2, MAX_RESTART_S)

    def stop(self, *, now: bool = False) -> None:
        """Asks every child to finish what it has, or ends them at once. The logs go too when all went well."""
        living = [(c, c.process) for c in reversed(self.children) if c.process is not None and c.process.poll() is None]
        for _, process in living:
            process.send_signal(signal.SIGKILL if now else signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child, process in living:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode not in (0, -signal.SIGTERM) and self.is_ready and not now:
                self.has_lost_child = True
                self.say(f"{child.name} did not end as it should; its log is {child.log}")
        if self.is_ready and not self.has_lost_child:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:  # somebody may want to know why
            (self.directory / "fleet-token").unlink(missing_ok=True)

    def _add(self, name: str, arguments: Sequence[str]) -> None:
        child = Child(name, [sys.executable, *arguments], self.directory / f"{name}.log")
        child.log.touch()
        self.children.append(child)
        self._spawn(child)

    def _spawn(self, child: Child) -> None:
        child.started_at = time.monotonic()
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with child.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the supervisor alone, which then ends the children in order.
            child.process = subprocess.Popen(  # noqa: S603
                child.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )


def _new_directory() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="splitfire-"))
    except OSError as exc:
        raise ConfigError(
            f"no directory for logs can be made: {exc.strerror or exc}; set TMPDIR to one that can be written"
        ) from exc


def free_port() -> int:
    """A port nobody listens on now, nor will for an outgoing connection: Linux takes those from 32768 on."""
    for port in secrets.SystemRandom().sample(OWN_PORTS, PORT_TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(f"none of {PORT_TRIES} ports from {OWN_PORTS.start} to {OWN_PORTS.stop - 1} is free")


def free_ports(count: int, *, but: int) -> list[int]:
    """Different ones."""
    found: set[int] = set()
    while len(found) < count:
        found |= {free_port()} - {but}
    return sorted(found)


def share(cpus: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """`cpus` in `count` equal runs; everybody gets all of them when there are too few."""
    if not count or len(cpus) < count:
        return [tuple(cpus)] * count
    size = len(cpus) // count
    return [tuple(cpus[i * size : (i + 1) * size]) for i in range(count)]


def default_cpus(num_prefill: int, num_decode: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The processors this process may use, divided between the roles by their number of workers."""
    cpus = sorted(os.sched_getaffinity(0))
    workers = num_prefill + num_decode
    if len(cpus) < workers:
        return (), ()
    at = len(cpus) // workers * num_prefill
    return tuple(cpus[:at]), tuple(cpus[at:])
