"""What GetFleet answers: workers, measured pairs, and why the latest requests went where they went. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from router.ejection import Circuit
from router.fleet import Fleet
from router.placing import Placed, Placing
from router.policies import PolicyName
from router.timeline import LEG_NAMES
from router.views import Candidate
from router.worker_handle import WorkerHandle
from splitfire.core.telemetry import Attributes
from splitfire.v1 import inference_pb2 as pb

NUM_SHOWN = 4  # candidates of a decision


class Describer:
    """`worker_ports`: this router's own. `policy`: how it places."""

    def __init__(self, fleet: Fleet, placing: Placing, policy: PolicyName, worker_ports: Sequence[str]) -> None:
        self._fleet = fleet
        self._placing = placing
        self._policy = policy
        self._worker_ports = worker_ports

    def __call__(self, num_decisions: int = 0) -> pb.GetFleetResponse:
        """With the latest `num_decisions` placements, of those that are kept."""
        latest = islice(self._placing.latest, num_decisions)
        return pb.GetFleetResponse(
            workers=[self._worker(worker) for worker in self._fleet.workers],
            pairs=self._pairs(),
            worker_ports=self._worker_ports,
            num_routers=self._fleet.num_routers,
            decisions=[self._decision(placed) for placed in latest],
        )

    def _worker(self, worker: WorkerHandle) -> pb.WorkerStatus:
        hello, load = worker.hello, worker.load
        return pb.WorkerStatus(
            worker_id=hello.worker_id, role=hello.role, is_draining=load.is_draining, incarnation=hello.incarnation.hex(),
            kv_dtype=hello.kv_format.dtype, block_size=hello.kv_format.block_size, total_blocks=load.total_blocks,
            free_blocks=load.free_blocks, running_sequences=load.running_sequences, queued_tokens=load.queued_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s, decode_tokens_per_s=load.decode_tokens_per_s,
            resident_bytes=load.resident_bytes, held_slots=load.held_slots, machine=hello.machine,
            cached_blocks=self._fleet.num_cached_blocks(worker.incarnation), state=self._state(worker),
        )  # fmt: skip

    def _state(self, worker: WorkerHandle) -> str:
        """The first that is true; an ejected worker that its role cannot do without is suspect."""
        now, circuit = time.monotonic(), self._fleet.guard.circuit(worker)
        if worker.is_draining:
            return "draining"
        if worker.is_ejected:
            return circuit.value
        if not worker.is_able(now):
            return "silent"
        is_suspect = circuit is not Circuit.CLOSED or now < worker.suspect_until
        return "suspect" if is_suspect else "ready"

    def _pairs(self) -> list[pb.Pair]:
        pairs = []
        for pair, known in self._fleet.pairs.items():
            prefill, decode = self._fleet.worker(pair.prefill), self._fleet.worker(pair.decode)
            assert prefill is not None  # a pair is known only while both are attached
            assert decode is not None
            here, there, found = prefill.hello, decode.hello, known.measured
            described = pb.Pair(
                prefill_worker_id=here.worker_id, decode_worker_id=there.worker_id, transport=found.transport, path=found.path,
                round_trip_s=found.round_trip_s, round_trip_p99_s=found.round_trip_p99_s, bytes_per_s=found.bytes_per_s,
                memcpy_bytes_per_s=found.memcpy_bytes_per_s, age_s=time.monotonic() - known.measured_at,
                is_same_machine=bool(here.machine.machine_id) and here.machine.machine_id == there.machine.machine_id,
            )  # fmt: skip
            pairs.append(described)
        return pairs

    def _decision(self, placed: Placed) -> pb.Decision:
        return pb.Decision(
            request_id=placed.request_id,
            prompt_tokens=placed.num_tokens,
            policy=self._policy,
            candidates=[self._candidate(candidate) for candidate in placed.decision.explain(NUM_SHOWN)],
        )

    def _candidate(self, candidate: Candidate) -> pb.Candidate:
        return pb.Candidate(
            prefill_worker_id=self._name(candidate.placement.prefill),
            decode_worker_id=self._name(candidate.placement.decode),
            cost_s=candidate.cost_s,
            wait_s=candidate.wait_s,
            compute_s=candidate.compute_s,
            ship_s=candidate.ship_s,
            admit_s=candidate.admit_s,
            delay_s=candidate.delay_s,
            cached_tokens=candidate.cached_tokens,
            present_tokens=candidate.present_tokens,
        )

    def _name(self, incarnation: bytes | None) -> str:
        """Of one that is gone, the beginning of its incarnation."""
        if incarnation is None:
            return ""
        worker = self._fleet.worker(incarnation)
        return worker.hello.worker_id if worker is not None else incarnation.hex()[:8]


def cost_attributes(candidate: Candidate) -> Attributes:
    """What a placement costs, as a span tells it."""
    seconds = {"cost": candidate.cost_s, "wait": candidate.wait_s, "compute": candidate.compute_s}
    seconds |= {"ship": candidate.ship_s, "admit": candidate.admit_s, "delay": candidate.delay_s}
    milliseconds = {f"splitfire.place.{part}_ms": round(1e3 * value, 3) for part, value in seconds.items()}
    tokens = {"cached_tokens": candidate.cached_tokens, "present_tokens": candidate.present_tokens}
    return {**milliseconds, **{f"splitfire.place.{name}": value for name, value in tokens.items()}}


def request_attributes(summary: pb.Summary, model: str, outcome: str) -> Attributes:
    """What a request's own span tells of it, by OpenTelemetry's names where it has one."""
    usage = summary.usage
    attributes: dict[str, str | int | float | bool] = {
        "splitfire.request_id": summary.request_id, "splitfire.outcome": outcome,
        "gen_ai.operation.name": "generate", "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens, "gen_ai.usage.output_tokens": usage.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
        "splitfire.first_token_ms": round(1e3 * summary.first_token_s, 3),
        "splitfire.second_token_ms": round(1e3 * summary.second_token_s, 3), "splitfire.rest_ms": round(1e3 * summary.rest_s, 3),
    }  # fmt: skip
    for phase in summary.phases:
        name = f"splitfire.{LEG_NAMES[phase.leg]}.{phase.name}_ms"
        attributes[name] = round(float(attributes.get(name, 0.0)) + 1e3 * phase.duration_s, 3)
    return attributes
