"""How a worker dials a router with certificates: who is refused says so, and new files need no restart (F71)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from router.doors import Doors
from splitfire.cli.credentials import write_certificates
from splitfire.core.flags import parse_settings
from splitfire.core.settings import RouterSettings, WorkerSettings
from splitfire.v1 import fleet_pb2_grpc
from splitfire.worker.channels import Dialler
from splitfire.worker.link import LinkOptions, RouterLink
from tests.router.test_flow import until
from tests.worker.test_link import Router, Side, never


def made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    write_certificates(directory, [], timedelta(days=1), datetime.now(UTC))
    return directory


def flags(directory: Path, role: str) -> list[str]:
    files = (("cert", f"{role}.pem"), ("key", f"{role}.key"), ("ca", "ca.pem"))
    return [f"--fleet-tls-{name}={directory}/{file}" for name, file in files]


def test_new_certificates_are_shown_at_the_next_dial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = made(tmp_path / "ours"), made(tmp_path / "theirs")
    doors = Doors(parse_settings(RouterSettings, flags(ours, "router"), prog="router"))
    settings = parse_settings(WorkerSettings, flags(theirs, "worker"), prog="worker")

    async def scene() -> None:
        router, side = Router(never, never), Side()
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(router, server)
        assert doors.private is not None
        port = server.add_secure_port("127.0.0.1:0", doors.private)
        await server.start()
        link = RouterLink(LinkOptions(f"127.0.0.1:{port}", dial=Dialler(settings).dial), side, lambda _error: None)
        task = asyncio.create_task(link.run())
        said: list[str] = []

        def is_told() -> bool:
            said.append(capsys.readouterr().out)
            return "router not reached" in "".join(said)

        await until(is_told)
        assert not router.num_attached
        for name in ("ca.pem", "worker.key", "worker.pem"):
            (theirs / name).write_bytes((ours / name).read_bytes())
        await until(lambda: router.num_attached)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)

    asyncio.run(scene())
