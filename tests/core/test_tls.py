"""Certificates that no other end would accept are refused where they are read, in one line (F71)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from splitfire.cli.credentials import write_certificates
from splitfire.core.errors import ConfigError
from splitfire.core.flags import parse_settings
from splitfire.core.identity import FleetRole
from splitfire.core.settings import RouterSettings, WorkerSettings
from splitfire.core.tls import read_authority, read_certificate, read_identity

NOW = datetime.now(UTC)
WEEK = timedelta(days=7)


def made(directory: Path) -> Path:
    directory.mkdir()
    write_certificates(directory, ["example.org", "10.1.2.3"], WEEK, NOW)
    return directory


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    return made(tmp_path / "fleet")


def read(fleet: Path, stem: str, role: FleetRole, now: datetime = NOW) -> None:
    identity = read_identity(fleet / f"{stem}.pem", fleet / f"{stem}.key", fleet / "ca.pem", role, now)
    assert identity.authority == (fleet / "ca.pem").read_bytes()
    assert "PRIVATE" not in repr(identity)


def test_what_is_made_is_accepted_and_can_be_made_again(fleet: Path) -> None:
    read(fleet, "router", FleetRole.ROUTER)
    read(fleet, "worker", FleetRole.WORKER)
    before = {name: (fleet / f"{name}.pem").read_bytes() for name in ("ca", "router", "worker")}
    write_certificates(fleet, [], WEEK, NOW)
    after = {name: (fleet / f"{name}.pem").read_bytes() for name in before}
    assert [name for name in before if before[name] == after[name]] == ["ca"], "the same authority, so nobody needs to be told"
    read(fleet, "router", FleetRole.ROUTER)
    assert {path.name for path in fleet.iterdir() if path.stat().st_mode & 0o077} == {"ca.pem", "router.pem", "worker.pem"}


def drop(name: str) -> Callable[[Path, Path], object]:
    return lambda fleet, other: (fleet / name).unlink()


def write(name: str, content: str) -> Callable[[Path, Path], object]:
    return lambda fleet, other: (fleet / name).write_text(content)


def show(name: str) -> Callable[[Path, Path], object]:
    def spoil(fleet: Path, other: Path) -> None:
        (fleet / name).chmod(0o640)

    return spoil


def take(name: str) -> Callable[[Path, Path], object]:
    return lambda fleet, other: (fleet / name).write_bytes((other / name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop("worker.pem"), "worker.pem: No such file"),
        (drop("worker.key"), "worker.key: No such file"),
        (drop("ca.pem"), "ca.pem: No such file"),
        (write("worker.pem", "hello"), "worker.pem: is not PEM"),
        (write("worker.key", "hello"), "worker.key: is not a PEM key without a password"),
        (write("worker.key", "x" * 2_000_000), "worker.key: is larger than"),
        (show("worker.key"), "worker.key: others can read it; chmod 600"),
        (take("worker.key"), "worker.key: is not the key of certificate"),
        (take("ca.pem"), "worker.pem: was not signed by"),
        (lambda fleet, other: [take(f"worker.{end}")(fleet, other) for end in ("pem", "key")], "worker.pem: was not signed by"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(fleet: Path, spoil: Callable[[Path, Path], object], says: str) -> None:
    spoil(fleet, made(fleet.parent / "other"))
    with pytest.raises(ConfigError) as caught:
        read(fleet, "worker", FleetRole.WORKER)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_time_and_role_are_checked(fleet: Path) -> None:
    with pytest.raises(ConfigError, match="expired at"):
        read(fleet, "router", FleetRole.ROUTER, NOW + WEEK)
    with pytest.raises(ConfigError, match="is not valid before"):
        read(fleet, "router", FleetRole.ROUTER, NOW - timedelta(days=1))
    with pytest.raises(ConfigError, match="is not for a router: has the names splitfire://worker"):
        read(fleet, "worker", FleetRole.ROUTER)
    with pytest.raises(ConfigError, match="is not for a worker"):
        read(fleet, "router", FleetRole.WORKER)
    assert read_certificate(fleet / "router.pem", fleet / "router.key", NOW).authority is None
    with pytest.raises(ConfigError, match="is not PEM"):
        read_authority(fleet / "router.key")


def test_an_authority_that_is_not_one_makes_nothing(fleet: Path) -> None:
    before = (fleet / "router.pem").read_bytes()
    (fleet / "ca.key").write_bytes((fleet / "router.key").read_bytes())
    with pytest.raises(ConfigError, match="do not belong together"):
        write_certificates(fleet, [], WEEK, NOW)
    (fleet / "ca.key").write_text("x")
    with pytest.raises(ConfigError, match="are not a PEM certificate and its key"):
        write_certificates(fleet, [], WEEK, NOW)
    assert (fleet / "router.pem").read_bytes() == before


@pytest.mark.parametrize("host", ["", "a b", "a" * 64, "ünï", "a..b", "1.2.3.4/8", "splitfire://worker"])
def test_host_names_are_checked(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        write_certificates(tmp_path, [host], WEEK, NOW)


FLEET_TLS = ("--fleet-tls-cert=x", "--fleet-tls-key=x", "--fleet-tls-ca=x")
TLS_AND_KEYS = ("--tls-cert=x", "--tls-key=x", "--keys-file=x")


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        (RouterSettings, ["--tls-cert=x"], "tls_key is missing"),
        (RouterSettings, ["--tls-key=x"], "tls_cert is missing"),
        (WorkerSettings, ["--fleet-tls-cert=x"], "fleet_tls_key and fleet_tls_ca is missing"),
        (RouterSettings, ["--host=0.0.0.0", "--tls-cert=x", "--tls-key=x"], "--tls-cert, --tls-key and --keys-file, or --insecure"),
        (RouterSettings, ["--host=0.0.0.0", "--keys-file=x"], "--tls-cert, --tls-key and --keys-file, or --insecure"),
        (RouterSettings, ["--host=0.0.0.0", *FLEET_TLS], "--tls-cert, --tls-key and --keys-file, or --insecure"),
        (RouterSettings, ["--worker-host=0.0.0.0", "--insecure"], "or both --fleet-token-file and --insecure"),
        (RouterSettings, ["--worker-host=0.0.0.0", "--fleet-token-file=x"], "or both --fleet-token-file and --insecure"),
        (RouterSettings, ["--worker-host=0.0.0.0", *TLS_AND_KEYS], "or both --fleet-token-file and --insecure"),
        (RouterSettings, ["--metrics-host=0.0.0.0", *TLS_AND_KEYS], "--insecure"),
        (
            WorkerSettings,
            ["--router=127.0.0.1:1,10.0.0.1:7071", "--fleet-token-file=x"],
            "router 10.0.0.1:7071 is reached in clear",
        ),
    ],
)
def test_what_others_can_reach_needs_tls_and_credentials(
    kind: type[RouterSettings] | type[WorkerSettings], flags: list[str], says: str
) -> None:
    """B112."""
    with pytest.raises(ConfigError, match=says):
        parse_settings(kind, flags, prog="test")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (RouterSettings, ["--host=0.0.0.0", *TLS_AND_KEYS]),
        (RouterSettings, ["--host=0.0.0.0", "--insecure"]),
        (RouterSettings, ["--worker-host=0.0.0.0", *FLEET_TLS]),
        (RouterSettings, ["--worker-host=0.0.0.0", "--fleet-token-file=x", "--insecure"]),
        (WorkerSettings, ["--router=router:7071", *FLEET_TLS]),
        (WorkerSettings, ["--router=router:7071", "--insecure"]),
        (WorkerSettings, ["--router=[::1]:7071"]),
    ],
)
def test_what_is_safe_needs_no_consent(kind: type[RouterSettings] | type[WorkerSettings], flags: list[str]) -> None:
    assert parse_settings(kind, flags, prog="test")
