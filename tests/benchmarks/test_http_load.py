"""What a load tool reports becomes rows; a request that was not answered is a target that was not met."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.http_load.__main__ import rows_of


def report(successful: int, total: int) -> dict[str, Any]:
    found = {"mean": 5.0, "median": 4.0, "percentiles": {"p10": 2.0, "p90": 8.0, "p95": 9.0}}
    metrics: dict[str, Any] = {
        name: {"successful": found} for name in ("time_to_first_token_ms", "inter_token_latency_ms", "output_tokens_per_second")
    }
    metrics["request_totals"] = {"successful": successful, "total": total}
    return {"benchmarks": [{"config": {"strategy": {"streams": 4}}, "metrics": metrics}]}


@pytest.mark.parametrize(("successful", "met"), [(20, True), (19, False)])
def test_every_request_has_to_be_answered(successful: int, met: bool) -> None:
    rows = rows_of("/v1/completions", report(successful, 20))
    assert {row.case for row in rows} == {"/v1/completions, 4 streams, 128/64 tokens"}
    assert [(row.metric, row.ours, row.met) for row in rows] == [
        ("requests answered", successful, met),
        ("time to first token, median", 4.0, None),
        ("time to first token, p95", 9.0, None),
        ("time between tokens, median", 4.0, None),
        ("time between tokens, p95", 9.0, None),
        ("output tokens", 5.0, None),
    ]
    assert rows[1].spread == 3.0
