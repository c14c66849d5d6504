"""A router's metrics, read when somebody asks. Event loop. Only loaded when somebody wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from router.fleet import Fleet
from router.request_metrics import Load, RequestMetrics
from splitfire.core.metrics import counter, gauge
from splitfire.v1 import inference_pb2

WHO = ("worker", "role")
PAIR = ("prefill", "decode", "transport", "path")


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Where the numbers are."""

    fleet: Fleet
    num_running: Callable[[], int]
    num_queued: Callable[[], int]
    of_requests: RequestMetrics

    def collect(self) -> list[Metric]:
        """Everything, as it is now."""
        workers = self.fleet.workers
        roles = Counter(role_name(worker.hello.role) for worker in workers)
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
            counter("handoff", "Hand-offs that ended", ("outcome",), [((k,), n) for k, n in self.fleet.handoffs.items()]),
            *self._of_workers(),
            *self.of_requests.collect(),
        ]

    def _of_workers(self) -> list[Metric]:
        """As they reported last: whoever scrapes routers alone sees the whole fleet."""
        loads = [((worker.hello.worker_id, role_name(worker.hello.role)), worker.load) for worker in self.fleet.workers]
        blocks = [((*who, "free"), load.free_blocks) for who, load in loads]
        blocks += [((*who, "total"), load.total_blocks) for who, load in loads]
        return [
            gauge("worker_blocks", "Blocks of KV", ("worker", "role", "state"), blocks),
            gauge("worker_running_sequences", "In the batch", WHO, [(who, load.running_sequences) for who, load in loads]),
            gauge("worker_queued_tokens", "Of prompts that wait", WHO, [(who, load.queued_tokens) for who, load in loads]),
            gauge("worker_prefill_tokens_per_second", "While it does", WHO, [(w, load.prefill_tokens_per_s) for w, load in loads]),
            gauge("worker_decode_tokens_per_second", "While it does", WHO, [(w, load.decode_tokens_per_s) for w, load in loads]),
        ]


def load_of(fleet: Fleet, num_running: int, num_queued: int) -> Load:
    """What gateways read."""
    decodes = [worker.load for worker in fleet.workers if not worker.is_prefill]
    total = sum(load.total_blocks for load in decodes)
    return Load(num_running, num_queued, 1 - sum(load.free_blocks for load in decodes) / total if total else 0.0)


def role_name(role: inference_pb2.Role.ValueType) -> str:
    return inference_pb2.Role.Name(role).removeprefix("ROLE_").lower()
