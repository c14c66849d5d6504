"""Where a process's metrics can be had: at its port, and at an OTLP collector. What is not wanted is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from splitfire.core.telemetry import SHUTDOWN_S, Telemetry, has_collector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from splitfire.core.metrics import OtelName


def wants_metrics(port: int | None) -> bool:
    """Whether anybody could see them. ConfigError when the collector's address is none."""
    return port is not None or has_collector("METRICS")


class MetricsOutlets:
    """Open from the start. `collect` reads what the thread owns that `post` reaches."""

    def __init__(
        self, host: str, port: int | None, telemetry: Telemetry, collect: Callable[[], list[Metric]],
        post: Callable[[Callable[[], None]], object], names: Mapping[str, OtelName],
    ) -> None:  # fmt: skip
        """ConfigError when it cannot listen there."""
        from splitfire.core.metrics import MetricsPort  # noqa: PLC0415 - 60 ms, only if used

        self.port = MetricsPort(host, port, collect, post).port if port is not None else None
        self._push = None
        if has_collector("METRICS"):
            from splitfire.core.metrics_push import MetricsPush  # noqa: PLC0415 - 60 ms, only if used

            self._push = MetricsPush(telemetry.resource, collect, post, names)

    def close(self) -> None:
        """The collector gets what is new, if it takes it within SHUTDOWN_S. Not on the thread that is asked for it."""
        if self._push is not None:
            self._push.close(SHUTDOWN_S)
