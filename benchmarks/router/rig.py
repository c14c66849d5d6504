"""What a case runs: routers on a core of their own, fake workers and clients on the other one. Nothing outlives the rig."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from benchmarks.orders import Orders, obey
from benchmarks.router.engine import INSTANT
from benchmarks.router.fake_worker import FleetShape
from benchmarks.transfer.ends import pin_for_life
from splitfire.cli.supervisor import free_port
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "pico"
CONTEXT = 16_384  # of the model that routers are told of: pico's tokenizer, and nothing is computed
ROUTER_CORE, OTHER_CORE = 0, 1
LOGS = ROOT / "build" / "logs"
SLOW_S = 300.0  # no single order takes this long
READY_S = 30.0
SPLIT = FleetShape(2, 2, INSTANT)


class Node(Orders):
    """A process that does what it is ordered to; an object of the class that `kind` names lives in it."""

    def __init__(self, kind: str, core: int, *args: str) -> None:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        super().__init__(kind, mine, SLOW_S)
        self._process = context.Process(target=_serve, args=(theirs, kind, core, args), name=kind, daemon=True)
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Router:
    """A process of the router itself, or of the bare relay, on one core with the processes of its pools. `flags` are for either."""

    def __init__(self, core: int, flags: Sequence[str], *, is_bare: bool = False) -> None:
        port, worker_port = free_port(), free_port()
        self.address, self.worker_address = f"127.0.0.1:{port}", f"127.0.0.1:{worker_port}"
        ours = ("router", f"--model={bench_model()}", f"--port={port}", f"--worker-port={worker_port}", "--log-level=error", *flags)
        module = ("benchmarks.router.bare", str(port), str(worker_port), *flags) if is_bare else ours
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / f"router-{port}.log").open("wb") as log:
            self._process = subprocess.Popen(
                ("taskset", "-c", str(core), sys.executable, "-m", *module),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        self._channel = grpc.insecure_channel(self.address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        grpc.channel_ready_future(self._channel).result(READY_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> pb.GetFleetResponse:
        return self._stub.GetFleet(pb.GetFleetRequest(), timeout=10)

    def cpu_s(self) -> float:
        """Processor time of the router's own process so far, every thread."""
        return cpu_s(self.pid)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self._channel.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Rig:
    """Routers, workers and clients that know each other."""

    def __init__(self, routers: Sequence[Router], workers: Node, clients: Sequence[Node]) -> None:
        self.routers = routers
        self.workers = workers
        self.clients = clients

    def attach(self, shape: FleetShape) -> None:
        """Other fake workers than before."""
        self.workers.do("attach", [r.worker_address for r in self.routers], shape)

    def all(self, order: str, *args: Any) -> list[Any]:
        """The same order to every process of clients, at once; with a seed of its own each."""
        for seed, client in enumerate(self.clients):
            client.begin(order, *args, seed)
        return [item for client in self.clients for item in client.result()]

    def cpu_s(self) -> float:
        return sum(router.cpu_s() for router in self.routers)


@contextlib.contextmanager
def rig(
    shape: FleetShape = SPLIT, flags: Sequence[str] = (), *, num_routers: int = 1, num_clients: int = 1, is_bare: bool = False
) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        routers = []
        for _ in range(num_routers):
            routers.append(Router(ROUTER_CORE, flags, is_bare=is_bare))
            stack.callback(routers[-1].stop)
        workers = node(stack, "FakeFleet", OTHER_CORE, str(bench_model()))
        clients = [node(stack, "Clients", OTHER_CORE) for _ in range(num_clients)]
        made = Rig(routers, workers, clients)
        made.attach(shape)
        for client in clients:
            client.do("connect", [r.address for r in routers], 4)
        yield made


def bench_model() -> Path:
    """A model's directory without weights, with room for long prompts."""
    made = ROOT / "build" / "checkpoints" / "router-bench"
    if not (made / "config.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        for file in MODEL.glob("*.json"):
            shutil.copy(file, made)
        config = json.loads((MODEL / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return made


def cpu_s(pid: int) -> float:
    """Of every thread of a process, to the nanosecond."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def wait_until_quiet(made: Rig, within_s: float) -> float:
    """Until neither router nor workers have anything open; how long that took."""
    began = time.perf_counter()
    while time.perf_counter() - began < within_s:
        statuses = [router.status() for router in made.routers]
        is_quiet = not any(s.running_requests or s.queued_requests for s in statuses)
        if is_quiet and not made.workers.do("num_open"):
            return time.perf_counter() - began
        time.sleep(0.02)
    raise TimeoutError(f"something is still open after {within_s:g} s")


def node(stack: contextlib.ExitStack, kind: str, core: int, *args: str) -> Node:
    node = Node(kind, core, *args)
    stack.callback(node.kill)
    return node


def _serve(connection: Connection, kind: str, core: int, args: Sequence[str]) -> None:
    pin_for_life(core)
    import uvloop  # noqa: PLC0415  only after pinning: threads of what is loaded inherit it

    from benchmarks.router import fakes, http_fakes, http_load, load  # noqa: PLC0415

    made = {kind.__name__: kind for kind in (fakes.FakeFleet, load.Clients, http_fakes.HttpEngines, http_load.HttpClients)}

    async def serve() -> None:
        # uvloop makes what it reads non-blocking, and an answer may be larger than a pipe.
        asyncio.get_running_loop().call_soon(os.set_blocking, connection.fileno(), True)
        await obey(connection, made[kind](*args))

    with contextlib.suppress(EOFError):
        uvloop.run(serve())
    os._exit(0)
