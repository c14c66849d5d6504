"""`python -m benchmarks.engine [flags of a worker]`: steps of the engine alone beside their floors. Ten minutes.

Decode at context 300 with 1, 4 and 16 streams and at 4096 with 1, 8 and 16; prompts of 512 and 2048 tokens. Each variant is an
engine of its own with everything else equal, and they take turns. Bandwidth and peak are measured with the same threads between
the turns, and count as the steps do: by the median of the case's turns. Flags that this does not know go to every variant:
--weights=int8, --kv-dtype=fp32, ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks.engine.loaded import SPARE_TOKENS, LoadedEngine, Variant
from benchmarks.engine.machine import READ_BYTES, Machine, Meter
from benchmarks.engine.rows import Case, Measured, rows_of
from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from splitfire.core.telemetry import configure_logging

SMOL135 = "build/checkpoints/smol135"
DECODES = ((300, 1), (300, 4), (300, 16), (4096, 1), (4096, 8), (4096, 16))  # context, streams
PREFILLS = (512, 2048)
BF16 = Variant("bf16", ("--kv-dtype=bf16",))
VARIANTS = (
    BF16,  # weights as stored; every other row is compared with it
    Variant("bf16, KV int8", ("--kv-dtype=int8",)),
    Variant("bf16, KV fp8", ("--kv-dtype=fp8_e4m3",)),
    Variant("weights int8", ("--kv-dtype=bf16", "--weights=int8")),
    Variant("weights int8, KV int8", ("--kv-dtype=int8", "--weights=int8")),
    Variant("torch alone", ("--kv-dtype=bf16", "--kernels=torch")),
)
STEPS_S, MIN_STEPS, MAX_STEPS = 0.5, 3, 40  # of one turn


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=SMOL135)
    add("--cpus", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1])
    add("--turns", type=int, default=5)
    add("--variants", type=lambda s: s.split(";"), help=f"some of: {'; '.join(v.name for v in VARIANTS)}; separated by semicolons")
    add("--contexts", type=lambda s: [int(x) for x in s.split(",")], default=[300, 4096])
    add("--quick", action="store_true", help="one turn of few steps and short contexts: whether it runs, not how fast")
    add("--name", default="", help="of the result file, after engine-MODEL: engine-MODEL-NAME.json")
    args, more = parser.parse_known_args(argv)
    if args.quick:
        args.turns, args.contexts = 1, args.contexts[:1]
    return args, more


def take_turns(
    engines: Sequence[LoadedEngine], meter: Meter, contexts: Sequence[int], turns: int, max_steps: int
) -> tuple[dict[str, Measured], dict[Case, Machine]]:
    """Every variant's medians of each turn, by its name; and what the machine could do meanwhile."""
    machines: dict[Case, list[Machine]] = {}
    taken = {e.variant.name: Measured(e.settings, e.loaded.model.config, e.loaded.layout, {}, {}) for e in engines}
    for context, streams in (d for d in DECODES if d[0] in contexts):
        for turn in range(1 + turns):  # the first warms up, and says how many steps a turn may have
            for engine in engines:
                name = engine.variant.name
                known = taken[name].decodes.get((context, streams), [])
                wanted = int(STEPS_S / known[-1]) if known else MIN_STEPS
                times = sorted(engine.decode(streams, context, min(max_steps, max(MIN_STEPS, wanted))))
                taken[name].decodes[context, streams] = [*(known if turn > 1 else []), times[len(times) // 2]]
            if turn:
                machines.setdefault((context, streams), []).append(meter.measure())
    for num_tokens in (n for n in PREFILLS if n <= max(contexts) * 2):
        for turn in range(1 + turns):
            for engine in engines:
                seconds = engine.prefill(num_tokens, turn)
                if turn:
                    taken[engine.variant.name].prefills.setdefault(num_tokens, []).append(seconds)
            if turn:
                machines.setdefault(num_tokens, []).append(meter.measure())
    return taken, {case: Machine.median(measured) for case, measured in machines.items()}


def main(argv: list[str]) -> int:
    args, more = parse(argv)
    os.sched_setaffinity(0, args.cpus)
    configure_logging("benchmark", "warning")
    num_tokens = max((context + SPARE_TOKENS) * streams for context, streams in DECODES if context in args.contexts)
    engines, skipped = [], []
    for variant in (Variant(v.name, (*v.flags, *more)) for v in VARIANTS if not args.variants or v.name in args.variants):
        if missing := variant.missing_flag():
            skipped.append(Row(variant.name, f"skipped: no {missing}", "", 0.0, None, "", None, "", None, 0.0))
        else:
            engines.append(LoadedEngine(variant, args.model, args.cpus, num_tokens))
    meter = Meter(len(args.cpus), READ_BYTES // (8 if args.quick else 1))
    taken, machines = take_turns(engines, meter, args.contexts, args.turns, MIN_STEPS if args.quick else MAX_STEPS)
    rows = [*rows_of(taken, machines, BF16.name), *skipped]
    model = args.model.rstrip("/").split("/")[-1]
    name, command = "-".join(filter(None, ("engine", model, args.name))), " ".join(["python -m benchmarks.engine", *argv])
    write(name, rows, command, directory=QUICK_RESULTS if args.quick else RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
