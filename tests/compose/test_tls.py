"""The profile `tls`: certificates and keys made by the node itself, and nothing for who has neither."""

from __future__ import annotations

import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from splitfire.cli.client import Client, ServerError
from tests.checkpoints import ROOT
from tests.compose.node import Node, run, up
from tests.e2e.fleets import greedy, until

pytestmark = pytest.mark.timeout(300)
NAME = "node.example.test"


class Secured:
    """The node, and what a client was given."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.authority = self.fetch("ca.pem")
        self.clients_key = self.fetch("clients.key")
        self.admins_key = self.fetch("admin.key")

    def fetch(self, name: str) -> bytes:
        """As docs/deploy.md says; a copy for the command line, which reads only private files."""
        code, content = self.node.container("router-tls").execute("cat", f"/credentials/{name}")
        assert code == 0, content
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(content)
        return content.strip().encode()

    def client(self, key: bytes | None) -> Client:
        return Client(f"localhost:{self.node.port}", key, self.authority)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with up(profiles=["tls"], SPLITFIRE_ADDRESS="0.0.0.0", SPLITFIRE_NAMES=f"{NAME} 192.0.2.7") as node:
        router = node.container("router-tls")
        until(lambda: router.is_well()[0], 90, lambda: node.compose("logs", "--tail=20"))
        yield Secured(node, tmp_path_factory.mktemp("credentials"))


def test_a_client_with_the_authority_and_a_key_is_served(secured: Secured) -> None:
    flags = [f"--tls-ca={secured.directory}/ca.pem", f"--api-key-file={secured.directory}/clients.key", "--max-tokens=4"]
    command = [sys.executable, "-m", "splitfire.cli", "generate", "import os", f"--server=localhost:{secured.node.port}", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True), ran.stderr
    assert ask_http(secured, {"Authorization": f"Bearer {secured.clients_key.decode()}"}) == 200


def test_nobody_else_is(secured: Secured) -> None:
    for key in (None, b"sf-" + b"x" * 43):
        with secured.client(key) as client, pytest.raises(ServerError, match="UNAUTHENTICATED"):
            list(client.generate(greedy(count=2), 10))
    with Client(secured.node.address) as in_clear_text, pytest.raises(ServerError):
        in_clear_text.model()
    assert ask_http(secured, {}) == 401
    with pytest.raises(grpc.RpcError):
        next(secured.node.stub().Generate(greedy(count=2), timeout=5))


def ask_http(secured: Secured, headers: dict[str, str]) -> int:
    """The status of OpenAI's list of models, the certificate checked."""
    context = ssl.create_default_context(cadata=secured.authority.decode())
    request = urllib.request.Request(f"https://localhost:{secured.node.http_port}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code


def test_the_fleet_is_for_its_administrator(secured: Secured) -> None:
    with secured.client(secured.clients_key) as client, pytest.raises(ServerError, match="PERMISSION_DENIED"):
        client.fleet()
    with secured.client(secured.admins_key) as client:
        status = client.fleet()
    assert len(status.workers) == 2
    assert [pair.path for pair in status.pairs] == ["shared memory"]


def test_the_certificate_is_for_the_names_that_were_given_and_the_port_for_the_address(secured: Secured) -> None:
    shown = secured.node.container("router-tls").execute("openssl", "x509", "-in", "/credentials/router.pem", "-noout", "-text")[1]
    assert f"DNS:{NAME}" in shown and "IP Address:192.0.2.7" in shown
    published = run("docker", "port", secured.node.container("node").id)
    assert f"0.0.0.0:{secured.node.port}" in published


def test_secrets_are_nowhere_but_in_their_files(secured: Secured) -> None:
    said = secured.node.compose("logs")
    keys = [secured.fetch(f"{name}.key").decode() for name in ("clients", "admin", "health", "router", "ca")]
    assert not [key for key in keys if key in said]
    listed = secured.node.container("router-tls").execute("sh", "-c", "stat -c '%a %n' /credentials/*")[1]
    assert {line.split()[0] for line in listed.splitlines()} == {"600"}
    assert secured.node.container("router-tls").execute("touch", "/credentials/x")[0] != 0


def test_what_was_made_stays(secured: Secured) -> None:
    """Another `up` makes nothing anew: clients keep what they were given."""
    before: Any = secured.fetch("router.pem"), secured.fetch("keys.toml")
    secured.node.compose("up", "--detach", "--force-recreate", "credentials")
    until(lambda: secured.node.container("credentials").state["Status"] == "exited", 30)
    assert secured.node.container("credentials").state["ExitCode"] == 0
    assert (secured.fetch("router.pem"), secured.fetch("keys.toml")) == before
