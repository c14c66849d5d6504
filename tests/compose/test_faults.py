"""Containers killed, restarted, starved of memory and disk, and cut off, while clients stream."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path

import grpc
import pytest

from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import ROOT
from tests.compose.node import FIXED, HERE, Container, Node, run, up
from tests.e2e.fleets import LONG, PROMPT, greedy, until
from tests.faults.proc.clients import Clients, Outcome, requests_of

pytestmark = pytest.mark.timeout(600)
NUM_CLIENTS = 4
REQUESTS = requests_of(96, 128, 96)
CACHELESS = HERE / "cacheless.yaml"
BACK_S = 60.0
FREED_S = 30.0  # F51
MEMBERS = ("router", "prefill", "decode")


def clients(node: Node, requests: Sequence[pb.GenerateRequest] = REQUESTS) -> Clients:
    return Clients([node.stub() for _ in range(NUM_CLIENTS)], requests)


def assert_right(outcomes: Sequence[Outcome], expected: Sequence[tuple[int, ...]]) -> None:
    """Nothing lost, no token wrong."""
    assert not [outcome.refusal for outcome in outcomes if outcome.refusal is not None]
    assert all(outcome.is_contiguous for outcome in outcomes)
    assert [outcome.ids for outcome in outcomes] == list(expected)


@pytest.fixture(scope="module")
def pair() -> Iterator[Node]:
    """Two workers of each role; no prefix cache, so that every prompt is computed and moved."""
    with up("--scale", "prefill=2", "--scale", "decode=2", files=(FIXED, CACHELESS)) as node:
        node.wait_whole(4, 4)
        yield node


@pytest.fixture(scope="module")
def expected(pair: Node) -> list[tuple[int, ...]]:
    """What a calm run brings."""
    outcomes = clients(pair).join()
    assert not [o.refusal for o in outcomes if o.refusal is not None]
    return [o.ids for o in outcomes]


@contextmanager
def under_load(node: Node, expected: Sequence[tuple[int, ...]]) -> Iterator[Clients]:
    """Clients that are streaming; at the end each must have what it should, and the node be whole and quiet."""
    streaming = clients(node)
    until(lambda: len(streaming.outcomes) >= NUM_CLIENTS, 60)
    yield streaming
    assert_right(streaming.join(), expected)
    node.wait_whole(4, 4)
    until(node.is_quiet, 20)


def test_a_decode_container_that_is_killed_loses_nothing(pair: Node, expected: list[tuple[int, ...]]) -> None:
    """`docker kill` under load. The engine takes it for somebody's will, so it comes back with the next `up`."""
    victim = pair.containers("decode")[0]
    with under_load(pair, expected) as streaming:
        run("docker", "kill", victim.id)
        assert not streaming.are_over
        pair.compose("up", "--detach", "--no-recreate", "--scale", "prefill=2", "--scale", "decode=2")
        until(lambda: victim.state["Running"], BACK_S)


def test_a_worker_that_crashes_is_started_again_by_the_engine(pair: Node, expected: list[tuple[int, ...]]) -> None:
    victim = pair.containers("decode")[1]
    before = victim.num_restarts
    with under_load(pair, expected):
        run("kill", "-KILL", str(victim.pid))
        until(lambda: victim.num_restarts == before + 1, BACK_S)


def test_an_upgrade_as_the_page_has_it_loses_nothing(pair: Node, expected: list[tuple[int, ...]]) -> None:
    """F18: every worker is told to go, and another takes its place, by the commands of docs/deploy.md, under load."""
    [commands] = re.findall(
        r"```sh\n(docker compose --profile cpu build\nfor .*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL
    )
    before = {container.id for role in ("prefill", "decode") for container in pair.containers(role)}
    script = commands.replace("docker compose --profile cpu", shlex.join(pair.command))
    with ThreadPoolExecutor(1) as pool:
        upgrade = pool.submit(lambda: run("bash", "-euc", script, timeout=500, environment=pair.environment))
        while not upgrade.done():
            assert_right(clients(pair).join(), expected)
        upgrade.result()
    assert not before & {container.id for role in ("prefill", "decode") for container in pair.containers(role)}
    pair.wait_whole(4, 4)
    until(pair.is_quiet, 20)


def test_a_container_out_of_memory_is_a_worker_killed(pair: Node, expected: list[tuple[int, ...]]) -> None:
    """F28: the kernel kills the worker for its cgroup's limit; the engine starts it again, and the trace that all wrote to is whole."""
    victim = pair.containers("decode")[0]
    before = victim.num_restarts
    with under_load(pair, expected):
        starve(victim)
        until(lambda: victim.num_restarts == before + 1, BACK_S)
    run("docker", "update", "--memory", "8g", "--memory-swap", "8g", victim.id)
    trace = pair.container("router").execute("cat", "/hub/trace.json")[1]
    assert {event["name"] for event in json.loads(trace)} > {"prefill", "decode"}


def starve(container: Container) -> None:
    """Gives it less memory than something in it is about to want, and has the kernel choose its worker."""
    used = int(container.execute("cat", f"/proc/{own_pid(container)}/statm")[1].split()[1]) * 4096
    limit = str(used + (256 << 20))
    run("docker", "update", "--memory", limit, "--memory-swap", limit, container.id)
    Path(f"/proc/{container.pid}/oom_score_adj").write_text("1000")
    run("docker", "exec", "--detach", container.id, "python", "-I", "-S", "-c", "x = b'x' * (1 << 30)")


def own_pid(container: Container) -> int:
    """Of the worker, as the containers count: all share `node`'s processes."""
    status = Path(f"/proc/{container.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1])


def test_workers_and_router_may_start_in_any_order() -> None:
    """F73: each is running before the next one is made; nobody has to be started twice."""
    node = Node(["cpu"])
    try:
        for order in permutations(MEMBERS):
            node.compose("up", "--detach", "node")
            for service in order:
                node.compose("up", "--detach", "--no-deps", service)
            node.wait_whole()
            assert [node.container(service).num_restarts for service in MEMBERS] == [0, 0, 0], order
            assert len(next(node.stub().Generate(greedy(count=2), timeout=30)).token_ids)
            node.compose("rm", "--stop", "--force", *MEMBERS)
    finally:
        node.down()


def test_stop_drains() -> None:
    """Answers that are under way end as they should, and everybody with 0."""
    with up(files=(FIXED, CACHELESS)) as node:
        node.wait_whole()
        requests = requests_of(NUM_CLIENTS, 64, 900)
        expected = [outcome.ids for outcome in clients(node, requests).join()]
        streaming = clients(node, requests)
        until(lambda: node.status().running_requests == NUM_CLIENTS, 20)
        node.compose("stop")
        assert_right(streaming.join(), expected)
        assert {service: node.container(service).state["ExitCode"] for service in ("node", *MEMBERS)} == dict.fromkeys(
            ("node", *MEMBERS), 0
        )


def test_a_full_disk_stops_nothing() -> None:
    """F29: the trace file and the health file are on a disk of 64 KiB, which is soon full."""
    with up(files=(FIXED, CACHELESS, HERE / "small_disk.yaml")) as node:
        node.wait_whole()
        calm = [outcome.ids for outcome in clients(node).join()]
        containers = [node.container(service) for service in MEMBERS]
        for container in containers:
            container.execute("sh", "-c", "cat /dev/zero >/small/rest")
            assert container.execute("df", "--output=avail", "/small")[1].split()[-1] == "0"
        assert_right(clients(node).join(), calm)
        assert all(container.is_well()[0] for container in containers)
        assert [container.num_restarts for container in containers] == [0, 0, 0]


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_a_client_that_vanishes_is_given_up(door: str) -> None:
    """F51: its container loses its network in mid stream, so nothing says goodbye. What it asked for would take minutes."""
    with up() as node:
        node.wait_whole()
        network, client = f"{node.project}_default", f"{node.project}-client"
        run("docker", "update", "--cpus", "0.05", node.container("decode").id)
        try:
            ask = [
                f"--network={network}",
                f"--volume={HERE}/client.py:/client.py:ro",
                "--entrypoint=python",
                "splitfire",
                "/client.py",
            ]
            run("docker", "run", "--detach", f"--name={client}", *ask, door)
            until(lambda: "token" in run("docker", "logs", client), 60, lambda: run("docker", "logs", client))
            until(lambda: node.status().running_requests == 1, 10)
            run("docker", "network", "disconnect", "--force", network, client)
            gone_at = time.monotonic()
            until(lambda: node.status().running_requests == 0, 2 * FREED_S)
            took = time.monotonic() - gone_at
            print(f"{door}: noticed after {took:.1f} s")
            assert took < FREED_S
            until(node.is_quiet, 10)
        finally:
            run("docker", "rm", "--force", client, check=False)


def test_a_name_that_stops_being_known_costs_nobody_anything() -> None:
    """F70: workers know their router by a name. While it cannot be resolved streams go on, and who starts then finds its router later."""
    with up(files=(FIXED, HERE / "by_name.yaml")) as node:
        node.wait_whole()
        hosts = Path(node.container("node").inspect()["HostsPath"])
        known = hosts.read_text()
        assert "fleet-router" in known
        stream = node.stub().Generate(LONG, timeout=120)
        assert next(stream).token_ids
        hosts.write_text("".join(line for line in known.splitlines(keepends=True) if "fleet-router" not in line))
        prefill = node.container("prefill")
        run("docker", "restart", prefill.id)
        until(lambda: "name not resolved" in prefill.logs(), 60)
        assert any(response.HasField("summary") for response in stream)
        assert len(node.workers()) == 1
        answered = [r for r in node.stub().Generate(greedy(PROMPT, 4), timeout=30) if r.token_ids]
        assert answered, "decode computes prompts itself"
        hosts.write_text(known)
        node.wait_whole()
        assert prefill.num_restarts == 0


def test_nobody_waits_for_a_client_that_left(pair: Node) -> None:
    """A stream that is cancelled over the published port holds nothing a second later."""
    stream = pair.stub().Generate(LONG, timeout=60)
    next(stream)
    stream.cancel()
    with pytest.raises(grpc.RpcError):
        next(stream)
    until(partial(pair.is_quiet), 5)
