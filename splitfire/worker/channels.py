"""Connections to routers: in clear text, or with certificates on both sides. io thread."""

from __future__ import annotations

from datetime import UTC, datetime

import grpc
import structlog

from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.core.identity import ROUTER_NAME, FleetRole, Identity
from splitfire.core.settings import WorkerSettings

log = structlog.get_logger("worker")
OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_TIME_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_FLEET_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)


def dial_in_clear_text(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=OPTIONS)


class Dialler:
    """Opens channels. Certificates are read again for each: new files are shown from the next one on."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._identity = self._read()

    def dial(self, address: str) -> grpc.aio.Channel:
        try:
            self._identity = self._read()
        except ConfigError as exc:
            log.error("what was read before stays", detail=str(exc))
        mine = self._identity
        if mine is None:
            return dial_in_clear_text(address)
        credentials = grpc.ssl_channel_credentials(mine.authority, mine.key, mine.certificates)
        options = (*OPTIONS, ("grpc.ssl_target_name_override", ROUTER_NAME))
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _read(self) -> Identity | None:
        settings = self._settings
        certificate, key, authority = settings.fleet_tls_cert, settings.fleet_tls_key, settings.fleet_tls_ca
        if certificate is None or key is None or authority is None:
            return None
        from splitfire.core.tls import read_identity  # noqa: PLC0415 - 160 ms, only if used

        return read_identity(certificate, key, authority, FleetRole.WORKER, datetime.now(UTC))
