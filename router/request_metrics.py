"""How long requests took and how they ended, as histograms and counters, read with the router's other metrics. Names are
OpenTelemetry's for generative AI where it has one, `splitfire_` otherwise, and `vllm:` on request, because
autoscalers and gateways read those. Event loop only. Only loaded when one of them is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from router.ended import CANCELLED, OK, Ended
from router.timeline import LEG_NAMES
from splitfire.core.metrics import OtelName, counter
from splitfire.v1 import inference_pb2 as pb

# The bounds that OpenTelemetry's conventions recommend for the three of theirs.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
EACH_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
PHASE_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MAX_OUTCOMES = 64  # reasons are a closed list; should one not be, it does not grow for ever
MAX_PHASES = 64
TOKENS = ("prompt", "cached", "generated", "draft", "accepted_draft")


@dataclass(frozen=True, slots=True)
class Load:
    """What gateways want to know beside."""

    running: int
    waiting: int
    kv_in_use: float  # of the decode workers' blocks, 0 to 1


class RequestMetrics:
    """Counts requests that are over. `is_vllm`: by its names too."""

    def __init__(self, model: str, load: Callable[[], Load], *, is_vllm: bool) -> None:
        self._model = model
        self._load = load
        self._is_vllm = is_vllm
        labels = ("gen_ai_request_model",)
        self._first_token = _histogram(
            "gen_ai_server_time_to_first_token_seconds", "Until the router had the first token", labels, FIRST_TOKEN_S
        )
        self._each_token = _histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean gap after the first token", labels, EACH_TOKEN_S
        )
        self._request = _histogram("gen_ai_server_request_duration_seconds", "Whole requests", (*labels, "error_type"), REQUEST_S)
        self._phase = _histogram("splitfire_phase_seconds", "Where the time of choice 0 went", ("leg", "phase"), PHASE_S)
        self._outcomes: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter(dict.fromkeys(TOKENS, 0))
        for histogram, values in ((self._first_token, (model,)), (self._each_token, (model,)), (self._request, (model, ""))):
            histogram.labels(*values)  # there from the start: a rate needs what was before
        self._phases: dict[tuple[str, str], Histogram] = {}  # looked up twenty times a request

    def add(self, ended: Ended) -> None:
        summary, usage = ended.summary, ended.summary.usage
        known = ended.outcome in self._outcomes or len(self._outcomes) < MAX_OUTCOMES
        outcome = ended.outcome if known else "other"
        self._outcomes[outcome] += 1
        counted = (usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens)
        counts = dict(zip(TOKENS, (*counted, usage.draft_tokens, usage.accepted_draft_tokens), strict=True))
        self._tokens.update(counts)
        exemplar = {"trace_id": summary.trace_id} if summary.trace_id else None
        error = "" if outcome == OK else outcome
        self._request.labels(self._model, error).observe(ended.duration_s, exemplar)
        if summary.first_token_s:
            self._first_token.labels(self._model).observe(summary.first_token_s, exemplar)
        if summary.each_token_s:
            self._each_token.labels(self._model).observe(summary.each_token_s, exemplar)
        if ended.outcome != CANCELLED:
            for (leg, phase), seconds in _totals(summary.phases).items():
                histogram = self._phases.get((leg, phase))
                if histogram is None and len(self._phases) < MAX_PHASES:
                    histogram = self._phases[leg, phase] = self._phase.labels(leg, phase)
                if histogram is not None:
                    histogram.observe(seconds, exemplar)

    def collect(self) -> list[Metric]:
        """Everything, as it is now."""
        histograms = (self._first_token, self._each_token, self._request, self._phase)
        own = [metric for histogram in histograms for metric in histogram.collect()]
        own += [
            counter("requests", "Requests that are over", ("outcome",), [((k,), v) for k, v in self._outcomes.items()]),
            counter("tokens", "Of requests that are over", ("type",), [((k,), v) for k, v in self._tokens.items()]),
        ]
        return own + self._as_vllm(own) if self._is_vllm else own

    def _as_vllm(self, own: Iterable[Metric]) -> list[Metric]:
        """The few that Gateway API's inference extension, KEDA and others read."""
        load = self._load()
        found = [_renamed(metric, VLLM[metric.name], self._model) for metric in own if metric.name in VLLM]
        for name, value in (
            ("num_requests_running", load.running),
            ("num_requests_waiting", load.waiting),
            ("kv_cache_usage_perc", load.kv_in_use),
            ("gpu_cache_usage_perc", load.kv_in_use),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", "As vLLM has it", labels=("model_name",))
            family.add_metric((self._model,), value)
            found.append(family)
        counts = {
            "prompt_tokens": self._tokens["prompt"], "generation_tokens": self._tokens["generated"],
            "prefix_cache_queries": self._tokens["prompt"], "prefix_cache_hits": self._tokens["cached"],
        }  # fmt: skip
        for name, count in counts.items():
            total = CounterMetricFamily(f"vllm:{name}", "As vLLM has it", labels=("model_name",))
            total.add_metric((self._model,), count)
            found.append(total)
        return found


VLLM: Mapping[str, str] = {
    "gen_ai_server_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds": "vllm:time_per_output_token_seconds",
    "gen_ai_server_request_duration_seconds": "vllm:e2e_request_latency_seconds",
}
MODEL = {"gen_ai_request_model": "gen_ai.request.model", "error_type": "error.type"}
OTEL: Mapping[str, OtelName] = {
    "gen_ai_server_time_to_first_token_seconds": OtelName("gen_ai.server.time_to_first_token", MODEL),
    "gen_ai_server_time_per_output_token_seconds": OtelName("gen_ai.server.time_per_output_token", MODEL),
    "gen_ai_server_request_duration_seconds": OtelName("gen_ai.server.request.duration", MODEL),
    "splitfire_phase_seconds": OtelName("splitfire.phase.duration", {}),
}


def _histogram(name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, labels, buckets=bounds, registry=None)


def _totals(phases: Iterable[pb.Phase]) -> Mapping[tuple[str, str], float]:
    """A request's chunks count as one."""
    found: dict[tuple[str, str], float] = {}
    for phase in phases:
        name = (LEG_NAMES[phase.leg], phase.name)
        found[name] = found.get(name, 0.0) + phase.duration_s
    return found


def _renamed(metric: Metric, name: str, model: str) -> Metric:
    """Summed over what vLLM has no label for."""
    family = HistogramMetricFamily(name, "As vLLM has it", labels=("model_name",))
    buckets: dict[str, float] = {}
    total = 0.0
    for sample in metric.samples:
        if sample.name.endswith("_bucket"):
            buckets[sample.labels["le"]] = buckets.get(sample.labels["le"], 0.0) + sample.value
        elif sample.name.endswith("_sum"):
            total += sample.value
    family.add_metric((model,), buckets=[*buckets.items()], sum_value=total)
    return family
