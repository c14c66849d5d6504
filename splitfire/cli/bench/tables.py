"""The rows as the terminal shows them."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from splitfire.cli.bench.numbers import exact, milliseconds, seconds, three
from splitfire.cli.bench.results import Results
from splitfire.cli.bench.statistics import Distribution, Row


def results_table(results: Results) -> Table:
    """One line a variant and rate, on 80 columns; times in ms."""
    targets = f"TTFT {exact(results.slo.ttft_s)}, ITL {exact(results.slo.itl_s)}"
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=f"In time: {targets}.", title_justify="left"
    )
    table.add_column("\nvariant", no_wrap=True)
    for title in (
        "\nrate",
        "\nsent",
        "\nfailed",
        "in\ntime",
        "good-\nput",
        "TTFT\np50",
        "\np99",
        "ITL\np50",
        "\np99",
        "tokens\n/s",
        "late\np99",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in results.rows:
        table.add_row(
            escape(row.variant),
            f"{row.rate:g}",
            str(row.num_requests),
            str(row.num_errors),
            f"{row.share_met:.0%}",
            three(row.goodput),
            *_ends(row.ttft),
            *_ends(row.itl),
            f"{row.tokens_per_s:.0f}",
            f"{milliseconds(row.late.p99)}{'!' if row.is_late else ''}" if row.late else "-",
            style="dim" if row.is_cut else None,
        )
    return table


def run_line(row: Row) -> str:
    """One run, as soon as it is over."""
    ttft = f"TTFT p50 {seconds(row.ttft.p50)}, p99 {seconds(row.ttft.p99)}" if row.ttft else "no answer"
    itl = f"; ITL p50 {seconds(row.itl.p50)}, p99 {seconds(row.itl.p99)}" if row.itl else ""
    failed = f"; {row.num_errors} failed" if row.num_errors else ""
    return f"  {row.share_met:.0%} of {row.num_requests} in time; {ttft}{itl}{failed}"


def _ends(times: Distribution | None) -> tuple[str, str]:
    return ("-", "-") if times is None else (milliseconds(times.p50), milliseconds(times.p99))
