"""What probes of a worker ask: its status port, grpc.health.v1 and nothing else, and a file for those that may not cost anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from splitfire.core.errors import ConfigError

log = structlog.get_logger("worker")
SERVICE = "splitfire.v1.Worker"
BEAT_S = 5.0  # between two touches of the file


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


class HealthFile:
    """There exactly while the worker is SERVING, and touched every BEAT_S: one that is old is of a worker that hangs, or is gone."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """ConfigError when it cannot be written."""
        self._path = path
        self._clock = clock
        self._beat_at: float | None = None  # None: it is not there
        self._has_failed = False
        try:
            path.touch()
            path.unlink()
        except OSError as exc:
            raise ConfigError(f"health_file {path}: {exc.strerror or exc}") from exc

    def set_serving(self, is_serving: bool) -> None:
        """Called again and again. A disk that is full changes what probes see, and nothing else."""
        try:
            if not is_serving:
                if self._beat_at is not None:
                    self._beat_at = None
                    self._path.unlink(missing_ok=True)
            elif self._beat_at is None or self._clock() - self._beat_at >= BEAT_S:
                self._beat_at = self._clock()
                self._path.touch()
                os.utime(self._path)
            self._has_failed = False
        except OSError as exc:
            if not self._has_failed:
                log.warning("the health file cannot be written", path=str(self._path), detail=exc.strerror)
            self._has_failed = True
