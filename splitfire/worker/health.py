"""The worker's status port: grpc.health.v1, for probes. Nothing else is served there."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from splitfire.core.errors import ConfigError

SERVICE = "splitfire.v1.Worker"


class HealthPort:
    """SERVING means: attached to a router, engine alive, not draining."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"{host}:{port}"
        self._servicer = HealthServicer()
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_HealthServicer_to_server(self._servicer, self._server)
        self._is_serving: bool | None = None
        self.port = 0

    async def start(self) -> None:
        try:
            self.port = self._server.add_insecure_port(self._address)
        except RuntimeError as exc:
            raise ConfigError(f"status_port: cannot listen on {self._address}: already in use, or not allowed") from exc
        await self._server.start()
        await self.set_serving(False)

    async def set_serving(self, is_serving: bool) -> None:
        if is_serving is self._is_serving:
            return
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._servicer.set(service, status)

    async def stop(self) -> None:
        await self._server.stop(0)
