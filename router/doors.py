"""Who may come in by either port: keys, token and certificates, as their files were last read. Event loop only."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import grpc
import structlog

from router.access import Access
from router.keys_file import read_keys
from router.tenants import KeyRing
from splitfire.core.errors import ConfigError
from splitfire.core.identity import FleetRole, Identity
from splitfire.core.limits import MAX_KEYS_FILE_BYTES
from splitfire.core.secret_files import read_private, read_secret
from splitfire.core.settings import LOOPBACK, RouterSettings

log = structlog.get_logger("router")
NO_TOKEN = b"splitfire"  # salts need to differ between tenants, not to be secret: no client can name one


class Certificates:
    """Of one port. What is read again is shown from the next connection on; those that stand keep what they have."""

    def __init__(self, read: Callable[[], Identity]) -> None:
        self._read = read
        self._next: grpc.ServerCertificateConfiguration | None = None
        first = read()
        fetch: Any = self._take  # may also return None, as its documentation says and its stub does not
        self.credentials = grpc.dynamic_ssl_server_credentials(_shown(first), fetch, first.authority is not None)

    def reload(self) -> None:
        self._next = _shown(self._read())

    def _take(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC's own thread, at every connection; None: as before."""
        taken, self._next = self._next, None
        return taken


class Doors:
    """ConfigError when a file cannot be used, at first; later what was read before stays."""

    def __init__(self, settings: RouterSettings) -> None:
        self.token = read_secret(settings.fleet_token_file) if settings.fleet_token_file else None
        self._settings = settings
        self.access = Access(self._read_keys(), self.token, _today, is_loopback=settings.host in LOOPBACK)
        self._reloads: list[Callable[[], None]] = [self._replace_keys]
        self.public = self._public()
        self.private = self._private()

    def also_reload(self, read: Callable[[], None]) -> None:
        """Another file's reader, for the next SIGHUP."""
        self._reloads.append(read)

    def reload(self) -> None:
        """SIGHUP. Each file for itself: one that cannot be used holds back none of the others."""
        for read in self._reloads:
            try:
                read()
            except ConfigError as exc:
                log.error("what was read before stays", detail=str(exc))
        log.info("credentials were read again")

    def _public(self) -> grpc.ServerCredentials | None:
        certificate, key = self._settings.tls_cert, self._settings.tls_key
        if certificate is None or key is None:
            return None
        from splitfire.core.tls import read_certificate  # noqa: PLC0415 - 160 ms, only if used

        return self._add(lambda: read_certificate(certificate, key, datetime.now(UTC)))

    def _private(self) -> grpc.ServerCredentials | None:
        settings = self._settings
        certificate, key, authority = settings.fleet_tls_cert, settings.fleet_tls_key, settings.fleet_tls_ca
        if certificate is None or key is None or authority is None:
            return None
        from splitfire.core.tls import read_identity  # noqa: PLC0415

        return self._add(lambda: read_identity(certificate, key, authority, FleetRole.ROUTER, datetime.now(UTC)))

    def _add(self, read: Callable[[], Identity]) -> grpc.ServerCredentials:
        certificates = Certificates(read)
        self._reloads.append(certificates.reload)
        return certificates.credentials

    def _replace_keys(self) -> None:
        self.access.keys = self._read_keys()

    def _read_keys(self) -> KeyRing | None:
        path = self._settings.keys_file
        if path is None:
            return None
        content = read_private(path, "keys file", MAX_KEYS_FILE_BYTES)
        try:
            return KeyRing(read_keys(content, self.token or NO_TOKEN))
        except ConfigError as exc:
            raise ConfigError(f"keys file {path}: {exc}") from exc


def _shown(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificates)], identity.authority)


def _today() -> date:
    return datetime.now(UTC).date()
