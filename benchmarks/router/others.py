"""Routers of others: sglang-router and vllm-router in front of fake HTTP engines, on the router's core; engines and clients on the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.opponents.server import BUILD, Command, Server, ServerFailed, ServerPlan, installed_versions, quiet_port
from benchmarks.router.engine import Speed
from benchmarks.router.rig import OTHER_CORE, ROUTER_CORE, Node, cpu_s, node

PYTHON = BUILD / "routers-venv" / "bin" / "python"
SGLANG, VLLM = "sglang-router", "vllm-router"
# Of cache_aware: by default it looks at loads only when they are 64 requests apart. On W8 these gave the best mean TTFT of three tried.
TUNED = ("--balance-abs-threshold=2", "--balance-rel-threshold=1.05")


class CountedServer(Server):
    """Whose processor time is counted."""

    def cpu_s(self) -> float:
        return sum(cpu_s(process.pid) for process in self._processes)


@dataclass(frozen=True, slots=True)
class Other:
    """A running router of somebody else."""

    name: str
    server: CountedServer
    engines: Node
    clients: Node


def why_not() -> str:
    return "" if PYTHON.exists() else "not installed: benchmarks/router/setup"


def versions() -> dict[str, str]:
    return installed_versions(PYTHON, (SGLANG, VLLM)) if not why_not() else {}


@contextlib.contextmanager
def other(name: str, speed: Speed, block_size: int, num_engines: int, policy: str) -> Iterator[Other]:
    """ServerFailed when it does not start."""
    if reason := why_not():
        raise ServerFailed(reason)
    with contextlib.ExitStack() as stack:
        engines, clients = node(stack, "HttpEngines", OTHER_CORE), node(stack, "HttpClients", OTHER_CORE)
        ports = [quiet_port() for _ in range(num_engines)]
        engines.do("serve", ports, speed, block_size)
        server = CountedServer(_plan(name, ports, policy))
        stack.enter_context(server)
        clients.do("connect", server.plan.port)
        yield Other(name, server, engines, clients)


def _plan(name: str, ports: list[int], policy: str) -> ServerPlan:
    port, metrics = quiet_port(), quiet_port()
    urls = [f"http://127.0.0.1:{p}" for p in ports]
    launch = (str(PYTHON), "-m", "sglang_router.launch_router") if name == SGLANG else (str(PYTHON.with_name("vllm-router")),)
    arguments = (
        *launch, f"--port={port}", "--host=127.0.0.1", f"--policy={policy}", f"--prometheus-port={metrics}", "--log-level=error",
        *(TUNED if policy == "cache_aware" else ()), "--worker-urls", *urls,
    )  # fmt: skip
    return ServerPlan(f"{name} {policy}", (Command(arguments, {}, (ROUTER_CORE,)),), (port,), "benchmarked")
