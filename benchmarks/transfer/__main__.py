"""`python -m benchmarks.transfer [--cores 0,1] [--rounds 11]`: the hand-off of 47 MB of KV, measured. About a minute."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.report import Row, half_spread, write
from benchmarks.transfer import nixl
from benchmarks.transfer.cases import BLOCKS, MIB, PIECES, Path, Shape
from benchmarks.transfer.ends import two_ends
from benchmarks.transfer.rounds import Compared, Measure, Ours, gigabytes_per_s, interleave

WINDOWS = ((1, 8), (2, 4), (4, 2))  # MiB of a message and how many are on their way: 8 MiB of slots at each end
SLOTS = (4 * MIB, 4)  # a worker's own
MEMCPY = "one memcpy"
PATHS = (
    # dtype, digest, the most it may take in memcpys
    ("bf16", True, 4.0),
    ("bf16", False, 3.0),
    ("int8", True, 6.0),
)
PARTS = {
    "pack": "pack: gather, convert, digest",
    "unpack": "unpack: verify and scatter",
    "progress": "UCX progress: copies",
    "tag_send": "UCX tag_send",
    "tag_recv": "UCX tag_recv",
    "tag_recv_with_handle": "UCX tag_recv of control",
    "tag_probe": "UCX tag_probe for control",
    "arm": "UCX arm",
}


def wire(ours: Ours, num_rounds: int) -> list[Row]:
    """The transport alone: messages between slots that are used again and again."""
    measures: dict[str, Measure] = {}
    cases = {f"wire, {mib} MiB messages, {window} at once": (mib * MIB, window) for mib, window in WINDOWS}
    for case, args in cases.items():
        measures[case] = partial(ours.wire, "slots", *args)
        measures[f"memcpy beside {case}"] = ours.memcpy
    taken = interleave(measures, num_rounds)
    rows = []
    for case in cases:
        compared = Compared(case, taken[case], taken[f"memcpy beside {case}"], MEMCPY)
        rows += [gigabytes_per_s(case, taken[case]), compared.row("time of 47 MB", "at least 0.65 of a memcpy's speed", 0.65)]
    return rows


def against_nixl(ours: Ours, cores: Sequence[int], num_rounds: int) -> list[Row]:
    """The same bytes in the same places, NIXL as it comes and at its best."""
    if reason := nixl.why_not():
        return [Row("against NIXL", f"skipped: {reason}", "", 0.0, None, "", None, "at least as fast as NIXL", None, 0.0)]
    packed = Path("compiled", "bf16", digest=False)
    moves: dict[Shape, Measure] = {shape: partial(ours.wire, "packed", shape.name, *SLOTS, packed) for shape in (BLOCKS, PIECES)}
    rows = []
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(nixl.nixl_pair(setting, cores)) for setting in nixl.SETTINGS]
        for shape, move in moves.items():
            ours.check(shape, move)
            measures = {"ours": move}
            for pair in pairs:
                for operation in ("READ", "WRITE"):
                    measures[f"{pair.setting.name} {operation}"] = partial(_nixl_move, pair, operation, shape)
            taken = interleave(measures, num_rounds)
            best = min(list(measures)[1:], key=lambda name: statistics.median(taken[name]))
            for name in list(measures)[1:]:
                target = ("at least as fast as NIXL's best", 1.0) if name == best else ("", None)
                rows.append(Compared(f"47 MB as {shape.name}", taken["ours"], taken[name], name).row("in place", *target))
    return rows


def _nixl_move(pair: nixl.NixlPair, operation: str, shape: Shape) -> float:
    """The request is made and moved once before: what a first time costs is not timed, and after a stop nothing is cold."""
    with pair.turn():
        pair.make(operation, shape)
        pair.move(operation, shape)
        return pair.move(operation, shape)


def whole_path(ours: Ours, num_rounds: int) -> list[Row]:
    """Pool to pool through two agents: control messages, headers, digests and rings included."""
    measures: dict[str, Measure] = {"memcpy": ours.memcpy}
    for dtype, digest, _ in PATHS:
        for ops in ("compiled", "torch"):
            measures[_path_name(ops, dtype, digest)] = partial(ours.path, Path(ops, dtype, digest))
            if dtype == "bf16":
                ours.check(BLOCKS, measures[_path_name(ops, dtype, digest)])
    taken = interleave(measures, num_rounds)
    rows = []
    for dtype, digest, most in PATHS:
        for ops in ("compiled", "torch"):
            case = _path_name(ops, dtype, digest)
            target = (f"at most {most:g} memcpys", 1 / most) if ops == "compiled" else ("", None)
            rows.append(Compared(case, taken[case], taken["memcpy"], MEMCPY).row("pool to pool", *target))
    return rows


def _path_name(ops: str, dtype: str, digest: bool) -> str:
    return f"whole path, bf16 to {dtype}, {'digests' if digest else 'no digests'}, {ops} ops"


def control(ours: Ours, seconds: float) -> list[Row]:
    """Control frames through two agents, and what waiting for them costs."""
    ours.sending.do("ping", 500)
    micros = sorted(s * 1e6 for s in ours.sending.do("ping", 4000))
    median, p99 = statistics.median(micros), micros[len(micros) * 99 // 100]
    ours.receiving.begin("idle", seconds)
    share = max(ours.sending.do("idle", seconds), ours.receiving.result())
    return [
        Row("control round trip", "p50", "us", median, None, "", None, "at most 100 us", median <= 100, half_spread(micros)),
        Row("control round trip", "p99", "us", p99, None, "", None, "", None, half_spread(micros)),
        Row(
            f"io loop, idle for {seconds:g} s",
            "processor",
            "% of a core",
            share,
            None,
            "",
            None,
            "at most 0.5 %",
            share <= 0.5,
            0.0,
        ),
    ]


def profile(ours: Ours, num_shipments: int = 10) -> list[Row]:
    """Where the io threads' processor time goes during one shipment. Last: counting slows everything down a little."""
    ends, path, rows = {"sender": ours.sending, "receiver": ours.receiving}, Path("compiled", "bf16", digest=True), []
    for end in ends.values():
        end.do("measure_parts")
    ours.path(path)
    for end in ends.values():
        end.do("parts")
    for _ in range(num_shipments):
        ours.path(path)
    for name, end in ends.items():
        parts = end.do("parts")
        ms = {part: 1e3 * parts["seconds"].get(part, 0.0) / num_shipments for part in PARTS}
        ms["rest"] = 1e3 * parts["cpu"] / num_shipments - sum(ms.values())
        labels = PARTS | {"rest": "event loop and the protocol's Python"}
        for part in sorted((part for part in ms if ms[part]), key=lambda part: -ms[part]):
            calls = f", {parts['calls'][part] / num_shipments:.0f} calls" if part in parts["calls"] else ""
            rows.append(Row(f"{name}'s time, 47 MB", labels[part] + calls, "ms", ms[part], None, "", None, "", None, 0.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1], help="sender's, receiver's")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--idle", type=float, default=10.0, help="seconds")
    args = parser.parse_args()
    with _ours(args.cores) as ours:
        rows = wire(ours, args.rounds)
        rows += against_nixl(ours, args.cores, args.rounds)
        rows += whole_path(ours, args.rounds)
        rows += control(ours, args.idle)
        rows += profile(ours)
    write(
        "transfer", rows, command="python -m benchmarks.transfer", versions={} if nixl.why_not() else {"nixl-cu12": nixl.version()}
    )


@contextlib.contextmanager
def _ours(cores: Sequence[int]) -> Iterator[Ours]:
    with two_ends(cores) as (sending, receiving):
        yield Ours(sending, receiving)


if __name__ == "__main__":
    main()
