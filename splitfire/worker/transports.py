"""Opens the transport that the settings name. UCX is loaded only when it is used, so tcp works where UCX is not installed."""

from __future__ import annotations

from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from splitfire.core.errors import ConfigError
from splitfire.core.settings import WorkerSettings


def open_transport(settings: WorkerSettings) -> Transport:
    """ConfigError, naming what is wrong, when it cannot be used here."""
    if settings.transport == "tcp":
        return TcpTransport(settings.tcp_host, settings.tcp_port, settings.tcp_advertise or None)
    try:
        from kvtransfer.ucx import UcxTransport  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(f"transport is ucx, but UCX cannot be loaded ({exc}); install ucxx, or use --transport tcp") from exc
    return UcxTransport(None if settings.ucx_devices == "all" else settings.ucx_devices)
