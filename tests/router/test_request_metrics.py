"""What is counted of requests that are over, by which names, and that it stays bounded; and which of them are remembered."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.ended import CANCELLED, OK, Ended
from router.recent import MAX_RECENT, Recent
from router.request_metrics import MAX_OUTCOMES, Load, RequestMetrics
from splitfire.v1 import inference_pb2 as pb


def ended(outcome: str = OK, *, trace_id: str = "", tenant: str = "a", number: int = 0, first_s: float = 0.2) -> Ended:
    first, second, rest = pb.LEG_FIRST_TOKEN, pb.LEG_SECOND_TOKEN, pb.LEG_REST
    phases = [
        pb.Phase(name="prefill", duration_s=first_s / 2, leg=first),
        pb.Phase(name="prefill", duration_s=first_s / 2, leg=first),
        pb.Phase(name="step", duration_s=0.01, leg=second),
        pb.Phase(name="forward", duration_s=0.08, leg=rest),
    ]
    usage = pb.Usage(prompt_tokens=100, cached_prompt_tokens=40, generated_tokens=10)
    summary = pb.Summary(
        request_id=f"r{number}",
        trace_id=trace_id,
        usage=usage,
        phases=phases,
        first_token_s=first_s,
        second_token_s=0.01,
        rest_s=0.08,
        each_token_s=0.01,
    )
    return Ended(tenant, "", "pico", outcome, 0.0, first_s + 0.1, summary)


def made(*, is_vllm: bool = False) -> RequestMetrics:
    return RequestMetrics("pico", lambda: Load(3, 2, 0.25), is_vllm=is_vllm)


class Shown:
    """As a scraper sees it."""

    def __init__(self, metrics: RequestMetrics) -> None:
        registry = CollectorRegistry()
        registry.register(self)
        self._metrics = metrics
        self.text = generate_latest(registry, "allow-utf-8").decode()  # type: ignore[no-untyped-call]
        plain = "\n".join(line.partition(" # ")[0] for line in self.text.splitlines() if line != "# EOF")
        families = text_string_to_metric_families(plain + "\n")
        self.values: dict[tuple[Any, ...], float] = {
            (s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples
        }

    def collect(self) -> list[Metric]:
        return self._metrics.collect()


def test_names_are_opentelemetrys_and_numbers_add_up() -> None:
    metrics = made()
    metrics.add(ended())
    metrics.add(ended("queue_full"))
    values = Shown(metrics).values
    model = ("gen_ai_request_model", "pico")
    assert values["gen_ai_server_time_to_first_token_seconds_sum", model] == pytest.approx(0.4)
    assert values["gen_ai_server_time_per_output_token_seconds_sum", model] == pytest.approx(2 * 0.01)
    assert values["gen_ai_server_request_duration_seconds_count", ("error_type", "queue_full"), model] == 1
    assert values["gen_ai_server_request_duration_seconds_count", ("error_type", ""), model] == 1
    assert values["splitfire_requests_total", ("outcome", "ok")] == 1
    assert values["splitfire_tokens_total", ("type", "cached")] == 80
    leg, phase = ("leg", "first_token"), ("phase", "prefill")
    assert values["splitfire_phase_seconds_count", leg, phase] == 2, "chunks of one request are one"
    assert values["splitfire_phase_seconds_sum", leg, phase] == pytest.approx(0.4)


def test_a_bucket_names_a_trace_that_fell_into_it() -> None:
    metrics = made()
    metrics.add(ended(trace_id="ab" * 16))
    [line] = [x for x in Shown(metrics).text.splitlines() if x.startswith("gen_ai_server_time_to_first_token") and 'le="0.25"' in x]
    assert '# {trace_id="' + "ab" * 16 + '"} 0.2' in line


def test_who_reads_vllms_names_finds_them() -> None:
    metrics = made(is_vllm=True)
    metrics.add(ended())
    metrics.add(ended("internal"))
    values = Shown(metrics).values
    model = ("model_name", "pico")
    assert values["vllm:num_requests_running", model] == 3
    assert values["vllm:num_requests_waiting", model] == 2
    assert values["vllm:kv_cache_usage_perc", model] == 0.25
    assert values["vllm:prompt_tokens_total", model] == 200
    assert values["vllm:generation_tokens_total", model] == 20
    assert values["vllm:time_to_first_token_seconds_count", model] == 2
    assert values["vllm:e2e_request_latency_seconds_count", model] == 2, "over all outcomes"
    assert values["vllm:e2e_request_latency_seconds_bucket", ("le", "+Inf"), model] == 2
    assert not [name for name, *_ in Shown(made()).values if name.startswith("vllm")]


def test_who_asks_before_there_was_a_request_finds_zeros() -> None:
    """A rate needs what was before, and a gateway its names."""
    values = Shown(made(is_vllm=True)).values
    assert values["vllm:time_to_first_token_seconds_count", ("model_name", "pico")] == 0
    assert values["gen_ai_server_time_per_output_token_seconds_count", ("gen_ai_request_model", "pico")] == 0
    assert values["splitfire_tokens_total", ("type", "cached")] == 0
    assert not [name for name, *_ in values if name.endswith("_created")]


def test_cancelled_requests_do_not_blur_the_phases_and_reasons_are_bounded() -> None:
    metrics = made()
    metrics.add(ended(CANCELLED))
    assert not [name for name, *_ in Shown(metrics).values if name.startswith("splitfire_phase")]
    for number in range(10 * MAX_OUTCOMES):
        metrics.add(ended(f"reason {number}"))
    outcomes = [labels for name, *labels in Shown(metrics).values if name == "splitfire_requests_total"]
    assert len(outcomes) == MAX_OUTCOMES + 1
    errors = [labels for name, *labels in Shown(metrics).values if name == "gen_ai_server_request_duration_seconds_count"]
    assert len(errors) == MAX_OUTCOMES + 2


def test_the_latest_requests_are_found_by_either_name_and_only_by_whom_they_belong_to() -> None:
    recent = Recent(lambda: 12.0)
    for number in range(MAX_RECENT + 5):
        recent.add(ended(number=number, trace_id=f"t{number}", tenant="ab"[number % 2], first_s=0.1 + (number == 77)))
    assert not recent.find("r4", None)
    [one] = recent.find("r6", None)
    assert recent.find("t6", "a") == [one]
    assert not recent.find("r6", "b")
    assert [e.summary.request_id for e in recent.latest(2, None)] == [f"r{MAX_RECENT + 4}", f"r{MAX_RECENT + 3}"]
    assert [e.summary.request_id for e in recent.slowest(1, "b")] == ["r77"]
    described = recent.describe(one)
    assert (described.tenant, described.outcome, described.age_s) == ("a", OK, 12.0)
