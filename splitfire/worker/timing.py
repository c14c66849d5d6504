"""What a worker tells the router of its time on an attempt: phases by leg, in order, without overlap. Pure.

Durations only: where they begin is laid out by the router, on its own clock (router/timeline.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from splitfire.engine.spent import SequenceTimes, Spent
from splitfire.v1 import fleet_pb2
from splitfire.v1.inference_pb2 import LEG_FIRST_TOKEN, LEG_REST, LEG_SECOND_TOKEN, Leg, Phase

MERGED_S = 5e-5  # a wait between two chunks that is shorter counts as part of the second


class Teller:
    """Makes the phases of one worker."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def prompt(self, received_at: float, times: SequenceTimes, told_at: float, num_cached: int) -> fleet_pb2.WorkerTiming:
        """From the moment when the Submit was read to the first token's frame."""
        started = times.started if times.started is not None else received_at
        done = times.prompt_done if times.prompt_done is not None else told_at
        phases = [self.phase(LEG_FIRST_TOKEN, "prefill-queue", started - received_at)]
        for chunk in times.chunks:
            waited_s = chunk.waited_s if chunk.waited_s >= MERGED_S else 0.0
            if waited_s:
                phases.append(self.phase(LEG_FIRST_TOKEN, "prefill-queue", waited_s))
            took_s = chunk.waited_s - waited_s + chunk.took_s
            phases.append(self.phase(LEG_FIRST_TOKEN, "prefill", took_s, count=chunk.num_steps, tokens=chunk.num_tokens))
        phases.append(self.phase(LEG_FIRST_TOKEN, "first_token", told_at - done))
        busy_s = sum(chunk.share_s for chunk in times.chunks)
        return fleet_pb2.WorkerTiming(phases=phases, cached_tokens=num_cached, busy_s=busy_s)

    def second(self, waited_s: float, step_s: float, unpack_s: float | None = None) -> list[Phase]:
        """The first token that a decode worker makes: `waited_s` since its KV was there (or the token before was told), of which
        `step_s` was its step. `unpack_s` is None where nothing was handed over."""
        step_s = min(step_s, waited_s)
        parts = [] if unpack_s is None else [("unpack", unpack_s), ("join", waited_s - step_s)]
        return self._phases(LEG_SECOND_TOKEN, [*parts, ("step", step_s)])

    def shipped(self, grant_s: float, pack_s: float) -> list[Phase]:
        """Of a hand-off, what came after the first token was told."""
        return self._phases(LEG_SECOND_TOKEN, [("grant", grant_s), ("pack", pack_s)])

    def rest(self, spent: Spent, took_s: float) -> list[Phase]:
        """All steps after the second token, which took `took_s` from its frame to the last one."""
        parts = [
            ("schedule", spent.schedule_s),
            ("draft", spent.draft_s),
            ("forward", spent.forward_s),
            ("sample", spent.sample_s),
        ]
        parts.append(("send", took_s - sum(seconds for _, seconds in parts)))
        return self._phases(LEG_REST, parts, spent.num_steps)

    def phase(self, leg: Leg.ValueType, name: str, duration_s: float, *, count: int = 0, tokens: int = 0) -> Phase:
        return Phase(
            name=name,
            duration_s=max(0.0, duration_s),
            worker=self._worker_id,
            leg=leg,
            count=count if count > 1 else 0,
            tokens=tokens,
        )

    def _phases(self, leg: Leg.ValueType, parts: Iterable[tuple[str, float]], count: int = 0) -> list[Phase]:
        return [self.phase(leg, name, seconds, count=count) for name, seconds in parts if seconds > 0]
