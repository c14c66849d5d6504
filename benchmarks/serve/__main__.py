"""`python -m benchmarks.serve CASE`. Each case starts what it measures on this machine, and writes results/serve-CASE-MODEL.json.

handoff        split against aggregated, one request at a time, interleaved
gap            what the hand-off of a prompt of eight chunks adds to token 1 and to token 2
idle           what an idle fleet costs, and the memory of each process
arrivals       requests at random times: prompts that wait together, one after the other against in shared steps

both-cores     W1, W2, W3: one worker on both cores, against vLLM and OpenVINO GenAI
one-core-each  W1, W2: prefill on one core and decode on the other, against vLLM's split and ours on one core
batching       W2 with several numbers of streams, split and aggregated, ours alone
interference   W4: long prompts arrive while four streams decode
prefix         W5: prompts that begin alike, with a prefix cache and without
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from benchmarks.serve.arrivals import arrivals
from benchmarks.serve.batching import batching
from benchmarks.serve.both_cores import both_cores
from benchmarks.serve.contestants import Lineup
from benchmarks.serve.handoff import gap, handoff
from benchmarks.serve.idle import idle
from benchmarks.serve.interference import interference
from benchmarks.serve.memory import memory
from benchmarks.serve.one_core_each import one_core_each
from benchmarks.serve.prefix import prefix

OURS_ALONE = {"handoff": handoff, "gap": gap, "idle": idle, "memory": memory, "batching": batching, "arrivals": arrivals}
AGAINST_OTHERS = {"both-cores": both_cores, "one-core-each": one_core_each, "interference": interference, "prefix": prefix}
ON_PICO = ("handoff", "gap", "idle", "memory", "batching")
SMOL135 = "build/checkpoints/smol135"
TURNS = {"handoff": 15, "gap": 15, "batching": 15, "arrivals": 3}
WARMUP = {"handoff": 3, "gap": 3, "batching": 3}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=[*OURS_ALONE, *AGAINST_OTHERS])
    add("--model", help=f"default: pico for {', '.join(ON_PICO)}, else {SMOL135} (python -m benchmarks.make_checkpoint)")
    add("--cpus", type=_numbers, default=[0, 1], help="the first is prefill's, the second decode's")
    add("--prompts", type=_numbers, default=[64, 256, 512, 1024])
    add("--output", type=int, default=16)
    add("--streams", type=_numbers, default=[4, 8, 16])
    add("--turns", type=int, help="how often each contestant is measured; default: 15 for what is ours alone, else 5")
    add("--warmup", type=int, help="turns before those that count; default: 3 and 1")
    add("--quick", action="store_true", help="one turn and few long prompts: whether it runs, not how fast")
    add("--seconds", type=float, default=20.0, help="of an idle fleet")
    add("--flag", action="append", default=[], help="for every worker of ours, such as --flag=--dtype=fp32")
    add("--also", action="append", default=[], help="one more of ours with these flags: --also='--weights=int8' (both-cores)")
    add("--against", type=lambda s: s.split(","), default=["vllm", "vllm-split", "openvino"], help="whom; empty: ours alone")
    add(
        "--vllm-dtypes",
        type=lambda s: s.split(","),
        default=_vllm_dtypes(),
        help="of both-cores and one-core-each; each is a server of its own",
    )
    add("--vllm-dtype", default=_vllm_dtypes()[0], help="elsewhere")
    add("--vllm-chunks", type=_numbers, default=[512], help="--max-num-batched-tokens beside its default (interference)")
    args = parser.parse_args(argv)
    args.model = args.model or ("pico" if args.what in ON_PICO else SMOL135)
    args.turns = 1 if args.quick else args.turns or TURNS.get(args.what, 5)
    args.warmup = WARMUP.get(args.what, 1) if args.warmup is None else args.warmup
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _vllm_dtypes() -> list[str]:
    """Without bf16 units its float32 prefills three times as fast and its bfloat16 decodes faster: both take part."""
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return ["bfloat16"] if has_bf16 else ["float32", "bfloat16"]


def main(argv: list[str]) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended too
    name = f"serve-{args.what}-{args.model.rstrip('/').split('/')[-1]}"
    command = " ".join(["python -m benchmarks.serve", *argv])
    directory = QUICK_RESULTS if args.quick else RESULTS
    if args.what in OURS_ALONE:
        write(name, OURS_ALONE[args.what](args), command, directory=directory)
        return 0
    rows: list[Row]
    with Lineup(args.model, args.against) as lineup:
        rows = AGAINST_OTHERS[args.what](args, lineup)
        rows += lineup.skipped
    write(name, rows, command, lineup.versions, directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
