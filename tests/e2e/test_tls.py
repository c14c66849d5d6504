"""A fleet whose ports have certificates: one request through all of it, who is kept out, and certificates that change while a stream runs."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from splitfire.cli.client import Client
from splitfire.cli.credentials import write_certificates
from splitfire.cli.supervisor import Fleet
from splitfire.core.identity import ROUTER_NAME
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from tests.checkpoints import ROOT
from tests.e2e.fleets import LONG, RunningFleet, greedy, refusal_of, start_fleet, until
from tests.e2e.test_cli import splitfire
from tests.router.fakes import make_hello

WEEK = timedelta(days=7)


def write(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    write_certificates(directory, [], WEEK, datetime.now(UTC))
    return directory


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("certs") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another fleet's."""
    return write(tmp_path_factory.mktemp("certs") / "theirs")


def shown_by(certs: Path, role: str) -> tuple[str, ...]:
    return (f"--fleet-tls-cert={certs}/{role}.pem", f"--fleet-tls-key={certs}/{role}.key", f"--fleet-tls-ca={certs}/ca.pem")


@pytest.fixture(scope="module")
def fleet(certs: Path) -> Iterator[RunningFleet]:
    class TlsFleet(Fleet):
        def client(self) -> Client:
            return Client(self.address, self._token.encode(), (certs / "ca.pem").read_bytes())

    public = (f"--tls-cert={certs}/router.pem", f"--tls-key={certs}/router.key")
    router = ("--split=always", *public, *shown_by(certs, "router"))
    with start_fleet("pico", router=router, worker=shown_by(certs, "worker"), kind=TlsFleet) as running:
        yield running


@pytest.fixture
def client(fleet: RunningFleet) -> Iterator[Client]:
    with fleet.fleet.client() as client:
        yield client


def test_a_request_goes_all_the_way(fleet: RunningFleet, certs: Path) -> None:
    ran = splitfire("generate", "import os", "--server", fleet.address, "--max-tokens=4", f"--tls-ca={certs}/ca.pem")
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True)


def test_a_client_is_told_who_does_not_prove_itself(fleet: RunningFleet, theirs: Path) -> None:
    """F71: test_wrong_ca_refused, on the clients' side."""
    ran = splitfire("fleet", "--server", fleet.address, f"--tls-ca={theirs}/ca.pem")
    assert ran.returncode == 1
    assert "does not prove who it is" in ran.stderr and "CERTIFICATE_VERIFY_FAILED" in ran.stderr
    with Client(fleet.address) as in_clear_text, pytest.raises(Exception, match="nobody answers"):
        in_clear_text.model()


def attach(fleet: RunningFleet, client: Client, certs: Path | None, role: str, authority: Path) -> grpc.RpcError:
    """What a worker hears that comes with these."""
    [port] = client.fleet().worker_ports
    pair = ((certs / f"{role}.key").read_bytes(), (certs / f"{role}.pem").read_bytes()) if certs else (None, None)
    credentials = grpc.ssl_channel_credentials((authority / "ca.pem").read_bytes(), *pair)
    options = (("grpc.ssl_target_name_override", ROUTER_NAME),)
    token = (fleet.fleet.directory / "fleet-token").read_text()
    with grpc.secure_channel(port, credentials, options=options) as channel, pytest.raises(grpc.RpcError) as caught:
        hello = fleet_pb2.AttachRequest(hello=make_hello())
        metadata = (("authorization", f"Bearer {token}"),)
        next(fleet_pb2_grpc.FleetStub(channel).Attach(iter([hello]), metadata=metadata, timeout=10))
    return caught.value


def test_only_a_workers_certificate_opens_the_worker_port(fleet: RunningFleet, client: Client, certs: Path, theirs: Path) -> None:
    """B78: each with the right token, none with the right certificate."""
    wrong_role = refusal_of(attach(fleet, client, certs, "router", certs))
    assert (wrong_role.code, wrong_role.reason) == (grpc.StatusCode.PERMISSION_DENIED, "fleet_role")
    for pair, authority in ((None, certs), (theirs, certs), (certs, theirs)):
        assert attach(fleet, client, pair, "worker", authority).code() is grpc.StatusCode.UNAVAILABLE
    right = refusal_of(attach(fleet, client, certs, "worker", certs))
    assert right.code is grpc.StatusCode.FAILED_PRECONDITION, "let in, and found to have another model"
    assert len(client.fleet().workers) == 2


def shown_to_clients(fleet: RunningFleet) -> str:
    host, port = fleet.address.split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def test_cert_rotation(fleet: RunningFleet, client: Client, certs: Path) -> None:
    """F71: new connections see the new certificate, streams that run go on; one that cannot be used changes nothing."""
    router = fleet.process("router")
    stream = client.generate(LONG, 60)
    next(stream)
    before = shown_to_clients(fleet)
    write(certs)
    router.send_signal(signal.SIGHUP)
    until(lambda: shown_to_clients(fleet) != before)
    assert shown_to_clients(fleet) == (certs / "router.pem").read_text()
    assert next(stream).token_ids
    stream.close()
    after = shown_to_clients(fleet)
    (certs / "router.key").write_text("lost")
    router.send_signal(signal.SIGHUP)
    until(lambda: "what was read before stays" in (fleet.fleet.directory / "router.log").read_text())
    assert shown_to_clients(fleet) == after
    assert any(response.token_ids for response in client.generate(greedy(count=4), 30))


def test_a_router_that_cannot_prove_itself_does_not_start() -> None:
    command = [
        sys.executable,
        "-m",
        "router",
        "--tls-cert=/nowhere/x.pem",
        "--tls-key=/nowhere/x.key",
        "--port=0",
        "--worker-port=0",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (2, "splitfire: certificate /nowhere/x.pem: No such file or directory\n")
