"""Workers without engines: attached to a Fleet by hand, answering what a test tells them to."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from router.admission import Admission, AdmissionLimits
from router.describe import Describer
from router.fleet import Fleet
from router.flow import Flow
from router.placement import Rules
from router.placing import Placing, Room
from router.views import Scan
from router.worker_handle import WorkerHandle
from splitfire.core.fingerprint import PROTOCOL_MAJOR, Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.telemetry import Telemetry
from splitfire.core.wire import fingerprint_to_wire, layout_to_wire
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.checkpoints import PICO

LAYOUT = KvLayout("fp32", 6, 2, 64, 32)


def fingerprint(weights: bytes = b"w" * 32, block_size: int = 32) -> Fingerprint:
    model = ModelDir(PICO)
    return Fingerprint(weights, model.config_digest, model.tokenizer_digest, model.rope_digest(512), "plain", block_size)


def make_hello(kind: str = "decode", name: str = "", **changes: Any) -> fleet_pb2.Hello:
    hello = fleet_pb2.Hello(
        worker_id=name or f"{kind}-x",
        incarnation=secrets.token_bytes(16),
        role=inference_pb2.ROLE_PREFILL if kind == "prefill" else inference_pb2.ROLE_DECODE,
        version=fleet_pb2.ProtocolVersion(major=PROTOCOL_MAJOR),
        fingerprint=fingerprint_to_wire(fingerprint()),
        kv_format=layout_to_wire(LAYOUT),
        transports=[fleet_pb2.TransportAddress(name="ucx", version="1.21", address=b"address")],
        capacity=fleet_pb2.Capacity(total_blocks=100, max_running=8, max_context=2048, chunk_tokens=256),
        host="here",
    )
    for field, value in changes.items():
        target: object = hello
        *path, last = field.split("__")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return hello


@dataclass
class Inside:
    """What stands between a router's two ports."""

    fleet: Fleet
    admission: Admission[Scan, Room]
    placing: Placing
    flow: Flow


def make_inside(limits: AdmissionLimits, rules: Rules, random: Random | None = None, vocab_size: int = 4096) -> Inside:
    """As RouterServer joins it; whatever changes is looked at at once."""
    random = random or Random(secrets.randbits(64))
    fleet = Fleet(ModelDir(PICO), lambda: admission.pump())
    placing = Placing(fleet, rules, random)
    admission: Admission[Scan, Room] = Admission(limits, lambda: time.monotonic(), placing.begin_scan, random)
    return Inside(fleet, admission, placing, Flow(fleet, admission, placing, Telemetry("test", None), vocab_size))


def describe(fleet: Fleet) -> inference_pb2.GetFleetResponse:
    """What GetFleet answers."""
    return Describer(fleet, Placing(fleet, Rules(), Random(0)), "cost", [])()


class FakeWorker:
    """One attached worker; `frames` are what the router sent it."""

    def __init__(self, fleet: Fleet, role: str, name: str = "") -> None:
        self.fleet = fleet
        self.handle = WorkerHandle(make_hello(role, name))
        fleet.add(self.handle)

    def taken(self) -> list[fleet_pb2.AttachResponse]:
        """Takes everything sent so far."""
        return [self.handle.outbox.get_nowait() for _ in range(self.handle.outbox.qsize())]

    def frames(self, kind: str) -> list[object]:
        """Takes everything sent so far; those of one kind."""
        return [getattr(frame, kind) for frame in self.taken() if frame.HasField(kind)]  # type: ignore[arg-type]

    def next_submit(self) -> fleet_pb2.Submit | None:
        """Takes what was sent up to it; what follows stays."""
        while self.handle.outbox.qsize():
            frame = self.handle.outbox.get_nowait()
            if frame.HasField("submit"):
                return frame.submit
        return None

    def submits(self) -> list[fleet_pb2.Submit]:
        return self.frames("submit")  # type: ignore[return-value]

    def output(
        self,
        attempt: int,
        offset: int,
        ids: Sequence[int],
        logprobs: int = 0,
        *,
        drafted: int = 0,
        accepted: int = 0,
        choice: int = 0,
        phases: Sequence[inference_pb2.Phase] = (),
    ) -> None:
        events = self.handle.attempts.get(attempt)
        if events is not None:
            one = inference_pb2.TokenLogprobs(chosen=inference_pb2.TokenLogprob(token_id=1, logprob=-1.0))
            events.on_output(
                self.handle.incarnation,
                fleet_pb2.SequenceOutput(
                    attempt=attempt,
                    offset=offset,
                    token_ids=ids,
                    logprobs=[one] * logprobs,
                    draft_tokens=drafted,
                    accepted_offsets=range(offset, offset + accepted),
                    choice=choice,
                    timing=fleet_pb2.WorkerTiming(phases=phases) if phases else None,
                ),
            )

    def finish(
        self,
        attempt: int,
        reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED,
        *,
        choice: int = 0,
        phases: Sequence[inference_pb2.Phase] = (),
    ) -> None:
        events = self.handle.attempts.get(attempt)
        if events is not None:
            finished = fleet_pb2.Finished(
                attempt=attempt,
                choice=choice,
                reason=reason,
                transfer_id=getattr(events, "transfer_id", b""),
                timing=fleet_pb2.WorkerTiming(phases=phases) if phases else None,
            )
            events.on_finished(self.handle.incarnation, finished)

    def refuse(
        self,
        attempt: int,
        reason: str = "handoff_failed",
        *,
        retryable: bool = True,
        code: int = 14,
        held: bytes = b"",
        choice: int | None = None,
    ) -> None:
        """`held`: the transfer that failed, from a prefill worker that keeps the prompt."""
        events = self.handle.attempts.get(attempt)
        if events is not None:
            refused = fleet_pb2.Refused(
                attempt=attempt,
                code=code,
                reason=reason,
                message=reason,
                is_retryable=retryable,
                is_held=bool(held),
                transfer_id=held,
                choice=choice,
            )
            events.on_refused(self.handle.incarnation, refused)

    def die(self) -> None:
        self.fleet.remove(self.handle)
