"""Results for people, in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from router.simulation.advice import Advice
from router.simulation.result import Result


def results_table(title: str, results: Mapping[str, Result]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("policy", "hit\nrate", "TTFT\nmean", "ms\np50", "\np90", "\np95", "\np99", "ITL\nmean", "ms\np99", "imbal-\nance"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for policy, result in results.items():
        ttft, itl = result.ttft, result.itl
        times = [f"{value * 1e3:.0f}" for value in (ttft.mean, ttft.p50, ttft.p90, ttft.p95, ttft.p99)]
        gaps = [f"{value * 1e3:.1f}" for value in (itl.mean, itl.p99)]
        table.add_row(policy, f"{result.hit_rate:.3f}", *times, *gaps, f"{result.imbalance:.3f}")
    return table


def advice_table(found: Sequence[Advice]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("requests\n/s", "prefill:\ndecode", "TTFT\np50", "ms\np90", "\np99", "ITL\np50", "ms\np99", "targets"):
        table.add_column(name, justify="left" if name in ("prefill:\ndecode", "targets") else "right", no_wrap=True)
    for advice in found:
        for way in sorted(advice.ways, key=lambda way: way.num_prefill):
            ttft, itl = way.result.ttft, way.result.itl
            times = [f"{value * 1e3:.0f}" for value in (ttft.p50, ttft.p90, ttft.p99)]
            gaps = [f"{value * 1e3:.1f}" for value in (itl.p50, itl.p99)]
            met = "met" if way.badness(advice.targets) <= 1 else "missed"
            mark = " *" if way is advice.choice else ""
            table.add_row(f"{advice.rate:.3g}", way.name + mark, *times, *gaps, met)
    return table
