"""The profile `gpu` without GPUs: workers compute on the CPU, and everything else is as compose.yaml has it, but for what the engine of a
small machine cannot give: devices, and memory locked without limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.compose.node import Node, run
from tests.e2e.fleets import greedy, until

pytestmark = pytest.mark.timeout(300)
GPUS = {"PREFILL_GPUS": "0", "DECODE_GPUS": "1,2", "DECODE_WORKERS": "2"}
WORKERS = ("prefill-gpu", "decode-gpu")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(["gpu"], files=(), **GPUS)
    config = yaml.safe_load(node.compose("config"))
    for name in WORKERS:
        service = config["services"][name]
        [devices] = service.pop("deploy")["resources"]["reservations"]["devices"]
        assert (devices["driver"], devices["count"], devices["capabilities"]) == ("nvidia", "all", ["gpu"])
        assert service.pop("ulimits") == {"memlock": -1}
        service["image"] = "splitfire"
        service["environment"]["SPLITFIRE_DEVICE"] = "cpu"
        service.pop("build", None)
    without = tmp_path_factory.mktemp("compose") / "compose.yaml"
    without.write_text(yaml.safe_dump(config))
    node.files = [without]
    try:
        node.compose("up", "--detach")
        node.wait_whole(3, 2)
        yield node
    finally:
        node.down()


def gpus_of(node: Node, service: str) -> list[str]:
    """What each worker of it was told to use."""
    found = []
    for container in node.containers(service):
        variables = Path(f"/proc/{container.pid}/environ").read_text().split("\0")
        found += [variable.partition("=")[2] for variable in variables if variable.startswith("CUDA_VISIBLE_DEVICES=")]
    return sorted(found)


def test_replicas_have_a_gpu_each(node: Node) -> None:
    assert gpus_of(node, "prefill-gpu") == ["0"]
    assert gpus_of(node, "decode-gpu") == ["1", "2"]
    assert any(response.token_ids for response in node.stub().Generate(greedy(count=4), timeout=30))


def test_a_worker_that_crashed_gets_its_gpu_back(node: Node) -> None:
    victim = node.containers("decode-gpu")[0]
    before = victim.num_restarts
    run("kill", "-KILL", str(victim.pid))
    until(lambda: victim.num_restarts == before + 1 and victim.pid, 30)
    node.wait_whole(3, 2)
    assert gpus_of(node, "decode-gpu") == ["1", "2"]


def test_what_is_compiled_and_downloaded_can_be_kept(node: Node) -> None:
    for service in WORKERS:
        assert node.containers(service)[0].execute("touch", "/kernels/x", "/hub/x") == (0, "")
