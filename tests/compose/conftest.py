"""An engine and an image, once; then each module brings up what it needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoints import ROOT
from tests.compose.node import Node, run, up

STARTER = ROOT.parent / "shared" / "docker" / "engine"  # where a bare machine has one beside the checkout


def pytest_sessionstart(session: pytest.Session) -> None:
    """The image is built from this checkout before any test's time begins; what is installed comes from the engine's cache next time."""
    if session.config.option.collectonly:
        return
    if "Server Version" not in run("docker", "info", check=False) and STARTER.exists():
        run(str(STARTER), "up", timeout=600)
    assert "Server Version" in run("docker", "info"), "no Docker engine is running"
    Node(["cpu"]).compose("build", timeout=1800)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """One prefill and one decode worker, whole; tests leave it as they found it."""
    with up() as node:
        node.wait_whole()
        yield node
