"""What the command line shows: the waterfall of one answer, the fleet, sizes and times for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitfire.core.machine import NETWORK
from splitfire.v1 import inference_pb2 as pb

SCREEN = 80


def print_waterfall(console: Console, summary: pb.Summary) -> None:
    """One line a phase: where it ran, how long it took, and when, drawn to scale."""
    end = max((p.start_s + p.duration_s for p in summary.phases), default=0.0) or 1e-9
    names = max((len(p.name) for p in summary.phases), default=0)
    where = max((len(p.worker) for p in summary.phases), default=0)
    width = SCREEN - names - where - len("12345.6") - 6  # what is left beside the other columns
    scale = f"{end * 1e3:.0f} ms"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("phase", "where", "ms"):
        table.add_column(title, justify="right" if title == "ms" else "left", no_wrap=True)
    table.add_column(f"0 {'─' * (width - len(scale) - 3)} {scale}", no_wrap=True)
    for phase in summary.phases:
        begin = min(int(phase.start_s / end * width), width - 1)
        length = min(max(1, round(phase.duration_s / end * width)), width - begin)
        table.add_row(phase.name, phase.worker, f"{phase.duration_s * 1e3:.1f}", " " * begin + "█" * length)
    console.print(table)
    usage = summary.usage
    line = f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached), {usage.generated_tokens} generated, seed {summary.seed}"
    if usage.draft_tokens:
        line += f"; drafts: {usage.accepted_draft_tokens} of {usage.draft_tokens} accepted"
    if summary.HasField("kv_transfer"):
        moved = summary.kv_transfer
        line += (
            f"; KV: {moved.bytes / 1e6:.2f} MB in {moved.blocks} blocks over {moved.transport} in {moved.duration_s * 1e3:.1f} ms"
        )
    console.print(line, style="dim", highlight=False)


def fleet_table(fleet: pb.GetFleetResponse) -> Table:
    """Fits 80 columns when ids are short."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("worker", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("KV", no_wrap=True)
    for title in ("free\nblocks", "running", "queued\ntokens", "prefill\ntok/s", "decode\ntok/s", "RSS\nMB"):
        table.add_column(title, justify="right", no_wrap=True)
    for worker in sorted(fleet.workers, key=lambda w: (w.role, w.worker_id)):
        role = pb.Role.Name(worker.role).removeprefix("ROLE_").lower()
        table.add_row(
            worker.worker_id,
            worker.state if worker.state not in ("", "ready") else role,
            f"{worker.kv_dtype}, {worker.block_size}",
            f"{worker.free_blocks}/{worker.total_blocks}",
            str(worker.running_sequences),
            str(worker.queued_tokens),
            rate(worker.prefill_tokens_per_s),
            rate(worker.decode_tokens_per_s),
            f"{worker.resident_bytes / 1e6:.0f}",
        )
    return table


def pair_line(pair: pb.Pair) -> str:
    """In rich's markup: KV that takes the network between workers of one machine is loud."""
    line = (
        f"{pair.prefill_worker_id} → {pair.decode_worker_id}: {pair.transport} over {pair.path}, "
        f"{pair.bytes_per_s / 1e9:.1f} GB/s, round trip {pair.round_trip_s * 1e6:.0f} µs"
    )
    if pair.is_same_machine and pair.path == NETWORK:
        return f"[bold red]{escape(line)}, though both are on one machine: splitfire doctor says why[/]"
    return escape(line)


def decision_lines(decision: pb.Decision) -> list[str]:
    """Why a request went where it went: the placement that was taken, then the cheapest of the others."""
    lines = [f"{decision.request_id}: {decision.prompt_tokens} tokens, placed by {decision.policy}"]
    for index, candidate in enumerate(decision.candidates):
        where = " → ".join(filter(None, (candidate.prefill_worker_id, candidate.decode_worker_id)))
        parts = {"wait": candidate.wait_s, "compute": candidate.compute_s, "ship": candidate.ship_s}
        parts |= {"room": candidate.admit_s, "delay of others": candidate.delay_s}
        cost = " + ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items() if seconds >= 5e-5) or "nothing"
        cached = f"; {candidate.cached_tokens} tokens cached" if candidate.cached_tokens else ""
        present = f", {candidate.present_tokens} at {candidate.decode_worker_id} already" if candidate.present_tokens else ""
        sign = "*" if index == 0 else " "
        lines.append(f"  {sign} {where}: {1e3 * candidate.cost_s:.1f} ms = {cost}{cached}{present}")
    return lines


def rate(value: float) -> str:
    return f"{value:.0f}" if value else "-"
