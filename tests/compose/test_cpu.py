"""The profile `cpu` as a newcomer has it: two commands, an answer, and nothing more open than is said."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import grpc
import pytest
from openai import OpenAI

from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import ROOT
from tests.compose.node import Node, run
from tests.e2e.fleets import greedy, until

pytestmark = pytest.mark.timeout(300)
START_S = 20.0  # from `up`, with images built, to the first token
IDLE_SHARE = 0.03  # of a core, for router and both workers, health checks and canaries included
IDLE_S = 60.0
MEMBERS = ("router", "prefill", "decode")


def test_the_first_token_comes_soon_after_up() -> None:
    """With nothing but compose.yaml. A client that was there first waits for it. The faster of two counts: machines have other work."""
    took = min(first_token_s(Node(["cpu"], files=())) for _ in range(2))
    print(f"{took:.1f} s from up to the first token")
    assert took < START_S


def first_token_s(node: Node) -> float:
    """Seconds from `up`; the node is taken down again."""
    try:
        began = time.monotonic()
        node.compose("up", "--detach")
        until(lambda: has_token(node), 3 * START_S)
        return time.monotonic() - began
    finally:
        node.down()


def has_token(node: Node) -> bool:
    try:
        return bool(next(node.stub().Generate(greedy(count=4), timeout=5, wait_for_ready=True)).token_ids)
    except grpc.RpcError:
        return False


def test_answers_come_through_the_published_ports(node: Node) -> None:
    command = [sys.executable, "-m", "splitfire.cli", "generate", "def f(", "--server", node.address, "--max-tokens=12", "--trace"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True), ran.stderr
    assert "join" in ran.stderr, "it was handed over"
    client = OpenAI(base_url=f"http://127.0.0.1:{node.http_port}/v1", api_key="none", max_retries=0, timeout=60)
    hello: Any = [{"role": "user", "content": "def fibonacci(n):"}]
    chunks = list(client.chat.completions.create(model="pico", messages=hello, max_tokens=16, stream=True))
    assert any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_doctor_proves_that_kv_between_two_containers_takes_shared_memory(node: Node) -> None:
    code, said = node.container("router").execute("splitfire", "doctor", "--server", "127.0.0.1:7070", "--json")
    report = json.loads(said)
    assert (code, report["ok"], report["findings"]) == (0, True, [])
    [pair] = report["pairs"]
    assert (pair["transport"], pair["path"], pair["is_same_machine"]) == ("ucx", "shared memory", True)
    print(f"{pair['bytes_per_s'] / 1e9:.1f} GB/s, round trip {pair['round_trip_s'] * 1e6:.0f} us")
    first, second = (member["facts"]["namespaces"] for member in report["members"])
    assert first == second
    assert node.container("prefill").id != node.container("decode").id


def test_containers_can_do_little(node: Node) -> None:
    """S5: no root, no writable root, no capability, and only the clients' ports published, on loopback."""
    for service in MEMBERS:
        container = node.container(service)
        assert container.execute("id", "-u") == (0, "10001\n")
        assert "Read-only file system" in container.execute("touch", "/app/x")[1]
        status = container.execute("grep", "CapEff", "/proc/self/status")[1]
        assert status.split() == ["CapEff:", "0000000000000000"]
        assert not container.inspect()["NetworkSettings"]["Ports"]
    published = run("docker", "port", node.container("node").id).splitlines()
    assert sorted(published) == [f"7070/tcp -> 127.0.0.1:{node.port}", f"8000/tcp -> 127.0.0.1:{node.http_port}"]


def test_health_checks_tell_the_truth(node: Node) -> None:
    """Of the router two tokens, of a worker its own word. Without a decode worker nothing is well but prefill."""
    for service in MEMBERS:
        well, said = node.container(service).is_well()
        assert well, said
    assert "2 tokens in" in node.container("router").is_well()[1]
    node.compose("stop", "decode")
    well, said = node.container("router").is_well()
    assert (well, "no decode worker" in said) == (False, True), said
    assert node.container("prefill").is_well()[0]
    node.compose("start", "decode")
    node.wait_whole()
    assert node.container("router").is_well()[0]


def test_what_health_checks_say_the_engine_knows(node: Node) -> None:
    """Within the interval of compose.yaml, once."""
    until(lambda: all(node.container(service).state["Health"]["Status"] == "healthy" for service in MEMBERS), 60)


def test_an_idle_node_costs_nearly_nothing(node: Node) -> None:
    until(node.is_quiet, 10)
    containers = [node.container(service) for service in MEMBERS]
    before = [container.cpu_s() for container in containers]
    began = time.monotonic()
    until(lambda: time.monotonic() - began > IDLE_S, IDLE_S + 5)
    took = time.monotonic() - began
    shares = [(container.cpu_s() - used) / took for container, used in zip(containers, before, strict=True)]
    print("of a core: " + ", ".join(f"{service} {share:.2%}" for service, share in zip(MEMBERS, shares, strict=True)))
    assert sum(shares) < IDLE_SHARE


def test_replicas_need_nothing_but_their_number(node: Node) -> None:
    node.compose("up", "--detach", "--scale", "decode=2", "--no-recreate")
    node.wait_whole(3, 2)
    asked = greedy(count=8)
    answers = [[token for r in node.stub().Generate(asked, timeout=30) for token in r.token_ids] for _ in range(4)]
    assert all(answer == answers[0] for answer in answers)
    node.compose("up", "--detach", "--scale", "decode=1", "--no-recreate")
    node.wait_whole()


def test_a_plain_router_is_not_published_to_others() -> None:
    """It says which profile is, and never listens."""
    node = Node(["cpu"], SPLITFIRE_ADDRESS="0.0.0.0")
    try:
        node.compose("up", "--detach", "node", "router")
        router = node.container("router")
        until(lambda: "use the profile tls or gpu-tls" in router.logs(), 20)
        until(lambda: router.state["ExitCode"] == 2, 20)
        assert node.status() == pb.GetFleetResponse()
    finally:
        node.down()
