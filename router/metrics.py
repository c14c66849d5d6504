"""A router's metrics, read at scrape time. Event loop. Only loaded when --metrics-port is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from router.fleet import Fleet
from splitfire.core.metrics import gauge
from splitfire.v1 import inference_pb2

PAIR = ("prefill", "decode", "transport", "path")


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Where the numbers are."""

    fleet: Fleet
    num_running: Callable[[], int]
    num_queued: Callable[[], int]

    def collect(self) -> list[Metric]:
        """Everything, as it is now."""
        workers = self.fleet.workers
        roles = Counter(inference_pb2.Role.Name(worker.hello.role).removeprefix("ROLE_").lower() for worker in workers)
        names = {worker.incarnation: worker.hello.worker_id for worker in workers}
        requests = [(("running",), self.num_running()), (("queued",), self.num_queued())]
        pairs = [
            ((names[link.prefill], names[link.decode], known.measured.transport, known.measured.path), known.measured)
            for link, known in self.fleet.pairs.items()
        ]
        return [
            gauge("workers", "Workers that are attached", ("role",), [((role,), roles[role]) for role in ("prefill", "decode")]),
            gauge("requests", "Choices of requests", ("state",), requests),
            gauge("pair_bytes_per_second", "Rate of KV, as last measured", PAIR, [(k, m.bytes_per_s) for k, m in pairs]),
            gauge("pair_round_trip_seconds", "Median round trip, as last measured", PAIR, [(k, m.round_trip_s) for k, m in pairs]),
        ]
