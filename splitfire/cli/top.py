"""`splitfire top`: a fleet at work, refreshed until Ctrl-C. Everything is of the public API: GetFleet, and the latest requests of the
router process that answers.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitfire.cli.client import Client, connect
from splitfire.cli.options import API_KEY_FILE, DEFAULT_SERVER, SERVER, TLS_CA
from splitfire.cli.render import pair_line, rate
from splitfire.v1 import inference_pb2 as pb

WINDOW_S = 60.0  # what rates and percentiles are of
LEAST_S = 10.0  # of a fleet that has just begun
LATEST = 300  # requests that are asked for
BAR = 12
OK = "ok"


def top(
    server: SERVER = DEFAULT_SERVER,
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="one look, then the end; also where this is no terminal")] = False,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """The fleet at work: queues, blocks, rates, pairs, drafts, phases and tenants, until Ctrl-C."""
    console = Console(highlight=False)
    with connect(server, api_key_file, tls_ca) as client:
        if once or not sys.stdout.isatty():
            console.print(look(client))
            return
        with Live(look(client), console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(interval)
                    live.update(look(client), refresh=True)
            except KeyboardInterrupt:
                return


def look(client: Client) -> Group:
    """Asks once."""
    return frame(client.fleet(), client.traces(last=LATEST), client.address)


def frame(fleet: pb.GetFleetResponse, traces: Sequence[pb.RequestTrace], address: str) -> Group:
    """What one look shows."""
    recent = [trace for trace in traces if trace.age_s <= WINDOW_S]
    least_s = LEAST_S if len(traces) < LATEST else 1e-3  # those that are asked for may all be of the last second
    window_s = WINDOW_S if len(recent) < len(traces) else min(WINDOW_S, max([least_s, *(t.age_s for t in recent)]))
    parts: list[Table | Text] = [_head(fleet, recent, window_s, address), _workers(fleet)]
    parts += [Text.from_markup(pair_line(pair)) for pair in fleet.pairs[:8]]
    if recent:
        parts += [Text(), _phases(recent), Text(), _tenants(recent, window_s)]
    return Group(*parts)


def percentile(values: Sequence[float], share: float) -> float:
    """By the nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _head(fleet: pb.GetFleetResponse, recent: Sequence[pb.RequestTrace], window_s: float, address: str) -> Text:
    done = [trace.summary for trace in recent if trace.outcome == OK]
    firsts = [summary.first_token_s for summary in done if summary.first_token_s]
    gaps = [summary.each_token_s for summary in done if summary.each_token_s]
    tokens = sum(trace.summary.usage.generated_tokens for trace in recent)
    drafted = sum(summary.usage.draft_tokens for summary in done)
    accepted = sum(summary.usage.accepted_draft_tokens for summary in done)
    failed = Counter(trace.outcome for trace in recent if trace.outcome != OK)
    head = Text()
    head.append(f"{address}", style="bold")
    head.append(f"   {fleet.running_requests} running, {fleet.queued_requests} waiting")
    head.append(f"   {len(recent) / window_s:.1f} requests/s, {tokens / window_s:.0f} tokens/s in the last {window_s:.0f} s\n")
    head.append(f"first token p50 {_ms(percentile(firsts, 0.5))}, p99 {_ms(percentile(firsts, 0.99))}")
    head.append(f"   each next p50 {_ms(percentile(gaps, 0.5))}, p99 {_ms(percentile(gaps, 0.99))}")
    if drafted:
        head.append(f"   drafts {accepted / drafted:.0%} right")
    if failed:
        head.append("   " + ", ".join(f"{count} {outcome}" for outcome, count in failed.most_common(4)), style="red")
    head.append("\n")
    return head


def _workers(fleet: pb.GetFleetResponse) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, is_number in (
        ("worker", False), ("state", False), ("KV blocks in use", False), ("running", True), ("queued", True),
        ("prefill tok/s", True), ("decode tok/s", True), ("RSS MB", True),
    ):  # fmt: skip
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for worker in sorted(fleet.workers, key=lambda w: (w.role, w.worker_id)):
        share = 1 - worker.free_blocks / worker.total_blocks if worker.total_blocks else 0.0
        role = pb.Role.Name(worker.role).removeprefix("ROLE_").lower()
        is_well = worker.state in ("", "ready")
        table.add_row(
            worker.worker_id,
            Text(role if is_well else worker.state, style="" if is_well else "bold red"),
            f"{_bar(share)} {share:4.0%} of {worker.total_blocks}",
            str(worker.running_sequences),
            str(worker.queued_tokens),
            rate(worker.prefill_tokens_per_s),
            rate(worker.decode_tokens_per_s),
            f"{worker.resident_bytes / 1e6:.0f}",
        )
    return table


def _phases(recent: Sequence[pb.RequestTrace]) -> Table:
    """Means over all answers: which one is slow."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("to token 1", no_wrap=True)
    table.add_column("mean ms", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("token 1 to 2", no_wrap=True)
    table.add_column("mean ms", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    columns = [_means(recent, leg) for leg in (pb.LEG_FIRST_TOKEN, pb.LEG_SECOND_TOKEN)]
    for i in range(max(map(len, columns))):
        cells: list[str] = []
        for column in columns:
            longest = max((seconds for _, seconds in column), default=0.0) or 1.0
            name, seconds = column[i] if i < len(column) else ("", 0.0)
            cells += [name, f"{seconds * 1e3:.2f}" if name else "", "█" * round(BAR * seconds / longest)]
        table.add_row(*cells)
    return table


def _means(recent: Sequence[pb.RequestTrace], leg: pb.Leg.ValueType) -> list[tuple[str, float]]:
    """In the order in which they come."""
    sums: dict[str, float] = defaultdict(float)
    there = [trace for trace in recent if any(phase.leg == leg for phase in trace.summary.phases)]
    for trace in there:
        for phase in trace.summary.phases:
            if phase.leg == leg:
                sums[phase.name] += phase.duration_s
    starts: dict[str, list[float]] = defaultdict(list)
    for trace in there:
        begin = min(phase.start_s for phase in trace.summary.phases if phase.leg == leg)
        for name, start_s in {p.name: p.start_s for p in reversed(trace.summary.phases) if p.leg == leg}.items():
            starts[name].append(start_s - begin)
    return [(name, sums[name] / len(there)) for name in sorted(sums, key=lambda name: sum(starts[name]) / len(starts[name]))]


def _tenants(recent: Sequence[pb.RequestTrace], window_s: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tenant", "requests/s", "prompt tok/s", "cached", "tokens/s", "first token p50", "p99", "failed"):
        table.add_column(title, justify="left" if title == "tenant" else "right", no_wrap=True)
    by_tenant: dict[str, list[pb.RequestTrace]] = defaultdict(list)
    for trace in recent:
        by_tenant[trace.tenant].append(trace)
    for name, its in sorted(by_tenant.items(), key=lambda item: -len(item[1]))[:8]:
        usages = [trace.summary.usage for trace in its]
        prompt = sum(usage.prompt_tokens for usage in usages)
        cached = sum(usage.cached_prompt_tokens for usage in usages)
        firsts = [trace.summary.first_token_s for trace in its if trace.summary.first_token_s]
        table.add_row(
            name,
            f"{len(its) / window_s:.1f}",
            f"{prompt / window_s:.0f}",
            f"{cached / prompt:.0%}" if prompt else "-",
            f"{sum(usage.generated_tokens for usage in usages) / window_s:.0f}",
            _ms(percentile(firsts, 0.5)),
            _ms(percentile(firsts, 0.99)),
            str(sum(trace.outcome != OK for trace in its)),
        )
    return table


def _bar(share: float) -> str:
    return "█" * round(BAR * share) + "·" * (BAR - round(BAR * share))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds else "-"
