"""What a person sees on a terminal of 80 columns."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from splitfire.cli.render import fleet_table, pair_line, print_waterfall
from splitfire.v1 import inference_pb2 as pb


def console() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=80), text


def test_the_fleet_fits_80_columns_and_nothing_is_cut() -> None:
    worker = pb.WorkerStatus(
        kv_dtype="fp32", block_size=32, free_blocks=1234, total_blocks=1365, running_sequences=64, queued_tokens=12345,
        prefill_tokens_per_s=4801, decode_tokens_per_s=700, resident_bytes=370_000_000,
    )  # fmt: skip
    fleet = pb.GetFleetResponse()
    for name, role in (("decode-0590af", pb.ROLE_DECODE), ("prefill-2c53a1", pb.ROLE_PREFILL)):
        worker.worker_id, worker.role = name, role
        fleet.workers.append(worker)
    screen, text = console()
    screen.print(fleet_table(fleet))
    assert "…" not in text.getvalue()
    rows = text.getvalue().splitlines()[-2:]
    assert rows[0].split() == ["prefill-2c53a1", "prefill", "fp32,", "32", "1234/1365", "64", "12345", "4801", "700", "370"]
    assert rows[1].startswith("decode-0590af")


def test_each_leg_of_the_waterfall_is_to_its_own_scale_and_never_runs_over() -> None:
    first, rest = pb.LEG_FIRST_TOKEN, pb.LEG_REST
    summary = pb.Summary(
        phases=[
            pb.Phase(name="prefill-queue", start_s=0.0, duration_s=0.05, worker="prefill-2c53a1", leg=first),
            pb.Phase(name="prefill", start_s=0.05, duration_s=0.05, worker="prefill-2c53a1", leg=first),
            pb.Phase(name="stream", start_s=0.1, duration_s=1e-6, worker="router", leg=first),
            pb.Phase(name="forward", start_s=0.1, duration_s=0.9, worker="decode-0590af", leg=rest, count=9),
            pb.Phase(name="sample", start_s=1.0, duration_s=0.1, worker="decode-0590af", leg=rest, count=9),
        ],
        first_token_s=0.1,
        rest_s=1.0,
        usage=pb.Usage(generated_tokens=12),
    )
    screen, text = console()
    print_waterfall(screen, summary)
    lines = text.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line for line in lines if ":" in line] == [
        "to token 1: 100.0 ms",
        "token 1 to 2: 0.0 ms, in one message with what was before",
        "all that follow: 1000.0 ms, 100.00 ms each of 10; sums over all steps",
    ]
    bars = {line.split()[0]: (line.count("█"), line.find("█")) for line in lines if "█" in line}
    assert bars["prefill"][0] == bars["prefill-queue"][0] > 15
    assert bars["prefill"][1] - bars["prefill-queue"][1] == bars["prefill"][0]
    assert bars["forward"][1] == bars["prefill-queue"][1], "a leg begins at the left"
    assert bars["forward"][0] == pytest.approx(9 * bars["sample"][0], abs=9)


def test_drafts_are_told_where_there_were_any() -> None:
    for drafted, said in ((0, "seed 3\n"), (40, "seed 3; drafts: 31 of 40 accepted\n")):
        usage = pb.Usage(generated_tokens=64, draft_tokens=drafted, accepted_draft_tokens=31 if drafted else 0)
        screen, text = console()
        print_waterfall(screen, pb.Summary(usage=usage, seed=3))
        assert text.getvalue().replace("\n", " ").strip().endswith(said.strip())


def test_a_pair_is_one_line_and_loud_when_it_takes_the_network_for_nothing() -> None:
    pair = pb.Pair(
        prefill_worker_id="p[0]", decode_worker_id="d0", transport="ucx", path="shared memory", bytes_per_s=8e9, round_trip_s=5e-6
    )
    screen, text = console()
    screen.print(pair_line(pair))
    assert text.getvalue() == "p[0] → d0: ucx over shared memory, 8.0 GB/s, round trip 5 µs\n"
    pair.path = "network"  # between machines it has to
    assert not pair_line(pair).startswith("[bold red]")
    pair.is_same_machine = True
    assert pair_line(pair).startswith("[bold red]")
