"""`splitfire top`: rates and percentiles of the last minute, and who is not well."""

from __future__ import annotations

import io

from rich.console import Console

from splitfire.cli.top import LATEST, LEAST_S, frame, percentile
from splitfire.v1 import inference_pb2 as pb


def shown(fleet: pb.GetFleetResponse, traces: list[pb.RequestTrace]) -> str:
    text = io.StringIO()
    Console(file=text, width=110).print(frame(fleet, traces, "here:7070"))
    return text.getvalue()


def fleet() -> pb.GetFleetResponse:
    workers = [
        pb.WorkerStatus(worker_id="p0", role=pb.ROLE_PREFILL, total_blocks=100, free_blocks=25, state="ready", queued_tokens=512),
        pb.WorkerStatus(worker_id="d0", role=pb.ROLE_DECODE, total_blocks=0, free_blocks=0, state="ejected"),
    ]
    return pb.GetFleetResponse(workers=workers, running_requests=3, queued_requests=2)


def trace(age_s: float, first_s: float, *, outcome: str = "ok", tenant: str = "a") -> pb.RequestTrace:
    phases = [pb.Phase(name="accept", duration_s=first_s / 4, leg=pb.LEG_FIRST_TOKEN, start_s=0.0)]
    phases.append(pb.Phase(name="prefill", duration_s=first_s * 3 / 4, leg=pb.LEG_FIRST_TOKEN, start_s=first_s / 4))
    usage = pb.Usage(prompt_tokens=60, cached_prompt_tokens=15, generated_tokens=11, draft_tokens=4, accepted_draft_tokens=3)
    summary = pb.Summary(usage=usage, phases=phases, first_token_s=first_s, second_token_s=0.01, rest_s=0.09, each_token_s=0.01)
    return pb.RequestTrace(summary=summary, tenant=tenant, outcome=outcome, age_s=age_s)


def test_a_look_at_a_busy_fleet() -> None:
    traces = [trace(1.0, 0.1), trace(2.0, 0.3), trace(3.0, 0.2, outcome="queue_full", tenant="b"), trace(61.0, 9.0)]
    text = shown(fleet(), traces)
    assert "3 running, 2 waiting" in text
    assert "0.1 requests/s" in text
    assert "p50 100.0 ms, p99 300.0 ms" in text, "of the last minute only"
    assert "each next p50 10.0 ms" in text
    assert "drafts 75% right" in text
    assert "1 queue_full" in text
    assert "75% of 100" in text
    assert "ejected" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["prefill"][1] == "150.00"
    assert lines["accept"][1] == "50.00"
    assert lines["a"][1:4] == ["0.0", "2", "25%"]
    assert lines["b"][-1] == "1"


def test_a_fleet_that_has_served_nobody_yet() -> None:
    assert "first token p50 -, p99 -" in shown(fleet(), [])


def test_rates_are_of_the_time_that_the_traces_span() -> None:
    """As many as are asked for came within two seconds; four came in a minute that has only begun."""
    assert f"{LATEST / 2:.1f} requests/s" in shown(fleet(), [trace(2.0 * n / LATEST, 0.1) for n in range(1, LATEST + 1)])
    assert f"{4 / LEAST_S:.1f} requests/s" in shown(fleet(), [trace(0.5, 0.1)] * 4)


def test_percentiles_are_values_that_were_there() -> None:
    assert percentile([], 0.99) == 0.0
    assert [percentile([5.0, 1.0, 3.0], share) for share in (0.0, 0.34, 0.5, 0.99, 1.0)] == [1.0, 3.0, 3.0, 5.0, 5.0]
