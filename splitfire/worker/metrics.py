"""A worker's metrics, read when somebody asks. io thread. Only loaded when somebody wants them."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from kvtransfer.agent import TransferAgent
from splitfire.core.metrics import counter, gauge
from splitfire.engine.engine import Engine
from splitfire.worker.load import LoadReporter
from splitfire.worker.tally import HandoffTally

PAIR = ("peer", "transport", "path")


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """Where the numbers are."""

    agent: TransferAgent
    engine: Engine
    reporter: LoadReporter
    tally: HandoffTally

    def collect(self) -> list[Metric]:
        """Everything, as it is now."""
        return [*self._pairs(), *self._transfers(), *self._drafts(), *self._memory()]

    def _pairs(self) -> list[Metric]:
        pairs = [((p.peer.worker_id, p.transport, p.rates.path), p.rates) for p in self.reporter.pairs]
        return [
            gauge("pair_bytes_per_second", "Rate of KV to a peer, as last measured", PAIR, [(k, r.bytes_per_s) for k, r in pairs]),
            gauge("pair_round_trip_seconds", "Median round trip, as last measured", PAIR, [(k, r.round_trip_s) for k, r in pairs]),
        ]

    def _transfers(self) -> list[Metric]:
        agent, tally = self.agent, self.tally
        rows = [(("send",), agent.num_sending), (("receive",), agent.num_receiving)]
        endings = [((ending.side.value, ending.outcome), count) for ending, count in tally.endings.items()]
        moved = [((side.value,), count) for side, count in tally.num_bytes.items()]
        dropped = [((reason,), count) for reason, count in (agent.dropped + agent.transport.dropped).items()]
        return [
            gauge("transfers_open", "Hand-offs under way", ("direction",), rows),
            counter("handoff", "Hand-offs that ended", ("side", "outcome"), endings),
            counter("handoff_bytes", "KV bytes of hand-offs that ended", ("side",), moved),
            counter("frames_dropped", "Frames and offers that were not taken", ("reason",), dropped),
        ]

    def _drafts(self) -> list[Metric]:
        counts = self.engine.draft_counts()
        drafted = [((source,), count.num_drafted) for source, count in counts.items()]
        accepted = [((source,), count.num_accepted) for source, count in counts.items()]
        return [
            counter("draft_tokens", "Tokens that a drafter proposed and a step verified", ("source",), drafted),
            counter("accepted_draft_tokens", "Those of them that were right", ("source",), accepted),
        ]

    def _memory(self) -> list[Metric]:
        rings = (("send", self.agent.send_ring), ("receive", self.agent.receive_ring))
        slots = [((name, state.value), count) for name, ring in rings for state, count in ring.counts().items()]
        with self.engine.lock:
            blocks = self.engine.blocks.counts()
        return [
            gauge("ring_slots", "Slots of the rings", ("direction", "state"), slots),
            gauge("ring_bytes", "Memory of the rings", ("direction",), [((name,), ring.num_bytes) for name, ring in rings]),
            gauge("kv_blocks", "Blocks of the KV pool", ("state",), [((state.value,), count) for state, count in blocks.items()]),
        ]
