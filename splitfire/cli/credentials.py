"""`splitfire key` and `splitfire certs`: make the credentials that a fleet is started with, as files and lines. Nothing is sent anywhere."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from splitfire.core.errors import ConfigError
from splitfire.core.identity import ROUTER_NAME, FleetRole
from splitfire.core.secret_files import read_bounded, read_private

KEY_PREFIX = "sf-"
LOCAL = ("localhost", "127.0.0.1", "::1")
CA_LIFETIME = timedelta(days=3650)
BACKDATED = timedelta(minutes=5)  # clocks differ
MAX_PEM_BYTES = 1 << 20


def key() -> None:
    """A new API key, and the line of the keys file that lets it in."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    typer.echo(secret)
    typer.echo(f'keys = ["sha256:{hashlib.sha256(secret.encode()).hexdigest()}"]')


def certs(
    directory: Annotated[Path, typer.Argument(help="where they go; made when missing")],
    host: Annotated[
        list[str] | None, typer.Option(help="name or address that clients reach the router by; may be given several times")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=CA_LIFETIME.days, help="how long router.pem and worker.pem are good for")] = 397,
) -> None:
    """An authority of a fleet's own, and a certificate each for its routers and workers. Again: new ones of the same authority."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in write_certificates(directory, host or (), timedelta(days=days), datetime.now(UTC)):
            typer.echo(str(path))
    except OSError as exc:
        raise ConfigError(f"{exc.filename or directory}: {exc.strerror or exc}") from exc


def write_certificates(directory: Path, hosts: Sequence[str], lifetime: timedelta, now: datetime) -> list[Path]:
    """The files that it wrote. The key of the authority is needed for nothing but the next time."""
    from splitfire.cli.authority import Authority  # noqa: PLC0415 - 160 ms, only if used

    begin, ca, written = now - BACKDATED, directory / "ca.pem", []
    if ca.exists():
        content = read_bounded(ca, "certificate", MAX_PEM_BYTES)
        authority = Authority.load(content, read_private(ca.with_suffix(".key"), "private key", MAX_PEM_BYTES))
    else:
        authority = Authority.make(begin, now + CA_LIFETIME)
        written += [_write(ca.with_suffix(".key"), authority.key, 0o600), _write(ca, authority.certificate, 0o644)]
    for role, names in ((FleetRole.ROUTER, (ROUTER_NAME, *LOCAL, *hosts)), (FleetRole.WORKER, ())):
        signed = authority.sign(role, names, begin, now + lifetime)
        path = directory / f"{role.name.lower()}.pem"
        written += [_write(path.with_suffix(".key"), signed.key, 0o600), _write(path, signed.certificate, 0o644)]
    return written


def _write(path: Path, content: bytes, mode: int) -> Path:
    """Whole or not at all, and never readable by others first."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    new.replace(path)
    return path
