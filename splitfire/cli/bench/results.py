"""What a report is made of, on the screen, in HTML and in JSON. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from splitfire.cli.bench.flags import Slo
from splitfire.cli.bench.statistics import CURVE, Cell, Outcome, Row


@dataclass(frozen=True, slots=True)
class Results:
    """`head` is what stands above all numbers, in order; `sentences` what they say; `warnings` and `notes` what to know of them."""

    model: str
    head: Mapping[str, str]
    slo: Slo
    rows: Sequence[Row]
    sentences: Sequence[str]  # one on each variant
    comparison: str  # of split and aggregated; empty where only one of them ran
    warnings: Sequence[str]
    notes: Sequence[str]

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.rows))

    @property
    def rates(self) -> list[float]:
        return sorted({row.rate for row in self.rows})


def as_json(results: Results, cells: Sequence[Cell]) -> dict[str, object]:
    """Rows, and below them every request; gaps are there as quantiles, of all and at CURVE, and as their mean of each request."""
    return {
        "benchmark": "bench serve",
        "model": results.model,
        **results.head,
        "slo": asdict(results.slo),
        "sentences": [*results.sentences, *filter(None, [results.comparison])],
        "warnings": list(results.warnings),
        "notes": list(results.notes),
        "quantiles": list(CURVE),
        "rows": [{**asdict(row), "share_met": row.share_met} for row in results.rows],
        "runs": [
            {
                "variant": cell.variant,
                "rate": cell.rate,
                "round": cell.turn + 1,
                "seconds": cell.duration_s,
                "requests": [_request(outcome) for outcome in cell.outcomes],
            }
            for cell in cells
        ],
    }


def _request(outcome: Outcome) -> dict[str, object]:
    return {
        "due_s": round(outcome.due_s, 6),
        "late_s": round(outcome.late_s, 6),
        "prompt": outcome.num_prompt,
        "cached": outcome.num_cached,
        "tokens": outcome.num_tokens,
        "ttft_s": None if math.isnan(outcome.ttft_s) else round(outcome.ttft_s, 6),
        "itl_s": round(outcome.itl_s, 6) if outcome.gaps_s else None,
        "error": outcome.error,
    }
