"""What the command line shows: the waterfall of one answer, the fleet, sizes and times for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitfire.core.machine import NETWORK
from splitfire.v1 import inference_pb2 as pb

SCREEN = 80


LEGS = (
    (pb.LEG_FIRST_TOKEN, "to token 1"),
    (pb.LEG_SECOND_TOKEN, "token 1 to 2"),
    (pb.LEG_REST, "all that follow"),
)


def print_waterfall(console: Console, summary: pb.Summary) -> None:
    """A leg after the other, each to its own scale: a line a phase, where it ran, how long it took, and when."""
    names = max((len(p.name) for p in summary.phases), default=0)
    where = max((len(p.worker) for p in summary.phases), default=0)
    seconds = {pb.LEG_FIRST_TOKEN: summary.first_token_s, pb.LEG_SECOND_TOKEN: summary.second_token_s, pb.LEG_REST: summary.rest_s}
    for tokens, (leg, title) in enumerate(LEGS, 1):
        phases = [phase for phase in summary.phases if phase.leg == leg]
        if phases:
            console.print(f"[bold]{title}: {seconds[leg] * 1e3:.1f} ms[/]{_each(leg, seconds[leg], summary.usage)}")
            console.print(_leg_table(phases, max(names, len("phase")), max(where, len("where"))))
        elif summary.phases and summary.usage.generated_tokens >= tokens:  # the router had fallen behind: two cores, both full
            console.print(f"[bold]{title}: 0.0 ms[/], in one message with what was before")
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


def _each(leg: pb.Leg.ValueType, seconds: float, usage: pb.Usage) -> str:
    """What a token took, where there are several."""
    count = usage.generated_tokens - 2
    return f", {seconds * 1e3 / count:.2f} ms each of {count}; sums over all steps" if leg == pb.LEG_REST and count > 0 else ""


def _leg_table(phases: Sequence[pb.Phase], names: int, where: int) -> Table:
    begin, end = phases[0].start_s, max(p.start_s + p.duration_s for p in phases)
    scale_s = max(end - begin, 1e-9)
    width = SCREEN - names - where - len("12345.67") - 6  # what is left beside the other columns
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("phase", no_wrap=True, width=names)
    table.add_column("where", no_wrap=True, width=where)
    table.add_column("ms", justify="right", no_wrap=True, width=len("12345.67"))
    table.add_column("", no_wrap=True)
    for phase in phases:
        at = min(int((phase.start_s - begin) / scale_s * width), width - 1)
        length = min(max(1, round(phase.duration_s / scale_s * width)), width - at)
        table.add_row(phase.name, phase.worker, f"{phase.duration_s * 1e3:.2f}", " " * at + "█" * length)
    return table


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
