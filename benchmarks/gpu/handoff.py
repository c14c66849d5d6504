"""A hand-off between two processes on one GPU: right, by cuda_ipc, and how long. `python -m benchmarks.gpu.handoff [--dry]`

`transfer_rows`: two ends of a worker's parts, from the first pack until the last block is verified and in its place, beside one copy of
the same bytes on the device. Packing, moving and unpacking are three such copies, so a ratio of a third is all there is to be had.

`handoff_exposed.exposed_rows`: what of that a client sees.

`--dry` goes the same way with host memory and tiny shapes: what it says of speed means nothing.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu.handoff_ends import End, Setup, lanes_of_gpu_memory, print_logs, two_ends
from benchmarks.gpu.handoff_exposed import DRY_FLEETS, FULL_FLEETS, exposed_rows, failed
from benchmarks.report import QUICK_RESULTS, RESULTS, Row, half_spread, write
from benchmarks.transfer.rounds import Compared, Measure, interleave
from kvtransfer.probe import PairRates
from splitfire.core.layout import KvLayout
from splitfire.core.machine import NETWORK

DTYPES = ("bf16", "int8", "fp8_e4m3")  # of the receiver's pool
MIB = 1 << 20
NUM_COMPARED = 64  # blocks; what the others hold is verified by their digests
COPY = "one copy on the device"
_runs = itertools.count(1)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What to measure, once for each size of slots; that of `setup` does not count."""

    setup: Setup
    slot_sizes: tuple[int, ...]  # as --slot-size has it; the first is the default
    num_rounds: int


# Llama-3.1-8B: 1074 MB.
FULL = TransferPlan(
    Setup("cuda", KvLayout("bf16", num_layers=32, num_kv_heads=8, head_dim=128, block_size=32), 8192, 2048, 4 * MIB),
    slot_sizes=(4 * MIB, 16 * MIB, 64 * MIB), num_rounds=7,
)  # fmt: skip
DRY = TransferPlan(Setup("cpu", KvLayout("bf16", 2, 2, 64, 16), 1001, 240, MIB // 8), slot_sizes=(MIB // 8,), num_rounds=3)


@dataclass(frozen=True, slots=True)
class Pair:
    """Prefill's and decode's end."""

    prefill: End
    decode: End
    setup: Setup

    def hand_off(self, dtype: str) -> float:
        """Seconds from the first pack until everything is verified and in its place."""
        run = next(_runs)
        self.prefill.do("fill", run)
        self.decode.do("expect", run, dtype)
        self.decode.begin("ready_at", run)
        self.prefill.begin("ship", run)
        began, ended = self.prefill.result(), self.decode.result()
        return float(ended - began)

    def memcpy(self, num_bytes: int) -> float:
        return float(self.decode.do("memcpy", num_bytes))


def rows(*, is_dry: bool) -> list[Row]:
    """Everything this file has to say. What cannot be measured here is a row that says why."""
    plan, fleets = (DRY, DRY_FLEETS) if is_dry else (FULL, FULL_FLEETS)
    return [*transfer_rows(plan), *exposed_rows(fleets)]


def transfer_rows(plan: TransferPlan) -> list[Row]:
    """One pair of processes for each size of slots. A pair that fails is a row that is not met."""
    found: list[Row] = []
    for size in plan.slot_sizes:
        case = f"hand-off, --slot-size {size // 1024}KiB"
        try:
            with two_ends(replace(plan.setup, slot_size=size)) as (prefill, decode):
                found += pair_rows(case, Pair(prefill, decode, plan.setup), plan.num_rounds)
        except (RuntimeError, OSError) as exc:  # TimeoutError too
            found.append(failed(case, f"{type(exc).__name__}: {exc}"))
    return found


def pair_rows(case: str, pair: Pair, num_rounds: int) -> list[Row]:
    rates = pair.prefill.do("measure")
    measures: dict[str, Measure] = {}
    num_bytes = {dtype: pair.setup.num_blocks * replace(pair.setup.layout, dtype=dtype).block_bytes for dtype in DTYPES}
    for dtype in DTYPES:
        measures[dtype] = partial(pair.hand_off, dtype)
        measures[f"copy for {dtype}"] = partial(pair.memcpy, num_bytes[dtype])
    taken = interleave(measures, num_rounds)
    found = []
    for dtype in DTYPES:
        name = f"{case}, bf16 to {dtype}, {num_bytes[dtype] / 1e6:.0f} MB"
        per_s = [num_bytes[dtype] / s / 1e9 for s in taken[dtype]]
        found.append(equality_row(f"check, {name}", pair, dtype))
        found.append(Compared(name, taken[dtype], taken[f"copy for {dtype}"], COPY).row("first pack to received", "reported"))
        found.append(Row(name, "rate", "GB/s", statistics.median(per_s), None, "", None, "reported", None, half_spread(per_s)))
    log = "\n".join(end.log.read_text(errors="replace") for end in (pair.prefill, pair.decode))
    path = path_row(case, pair.setup.device, rates, lanes_of_gpu_memory(log))
    if path.met is False:
        print_logs((pair.prefill, pair.decode))
    return [path, *found]


def equality_row(case: str, pair: Pair, dtype: str) -> Row:
    """After one more hand-off: blocks of a random choice, the last one always among them, that are not what torch makes of the
    sender's; and blocks beside them that something was written to."""
    num_blocks = pair.setup.num_blocks
    pair.hand_off(dtype)
    blocks = sorted({*random.sample(range(num_blocks), min(NUM_COMPARED, num_blocks)), num_blocks - 1})
    wrong = num_different(pair.prefill.do("expected", dtype, blocks), pair.decode.do("found", dtype, blocks))
    wrong += pair.decode.do("num_touched", dtype)
    return Row(case, f"wrong blocks, {len(blocks)} compared", "", wrong, None, "", None, "none", not wrong, 0.0)


def num_different(expected: Sequence[int], found: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(expected, found, strict=True))


def path_row(case: str, device: str, rates: PairRates, lanes: Sequence[str]) -> Row:
    """The pair's own measurement. On a GPU UCX has to name cuda_ipc for GPU memory, and no network interface may have seen the bytes: UCX
    falls back to TCP without a word."""
    rate = rates.bytes_per_s / 1e9
    if device == "cpu":
        return Row(case, f"pair's rate, {rates.path}", "GB/s", rate, None, "", None, "", None, 0.0)
    is_by_ipc = any("cuda_ipc" in lane for lane in lanes) and rates.path != NETWORK
    how = f"pair's rate, {rates.path}, GPU memory by {' and '.join(lanes) or 'nothing that UCX names'}"
    return Row(case, how, "GB/s", rate, None, "", None, "by cuda_ipc", is_by_ipc, 0.0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.handoff", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes: whether it all runs")
    args = parser.parse_args(argv)
    found = rows(is_dry=args.dry)
    command = " ".join(["python -m benchmarks.gpu.handoff", *argv])
    write("gpu-handoff", found, command, directory=QUICK_RESULTS if args.dry else RESULTS)
    return int(any(row.met is False for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
