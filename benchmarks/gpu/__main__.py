"""Everything a GPU has to show, in one call of at most nine minutes: `python -m benchmarks.gpu [--dry] [--only PART] [--out FOLDER]`.

First what the GPU can do at most (a copy, a product), then every kernel and the engine against fp32: the first that is wrong ends it.
Then each part beside its opponents in the same run, and beside its floor. One table last, and a file of results.

`--dry` goes the same ways on a CPU with tiny shapes, by Triton's interpreter: what it says of speed means nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes: whether it all runs")
    parser.add_argument("--only", choices=("checks", "attention", "step", "handoff"), help="one part; ceilings are always measured")
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results, or build/results with --dry")
    args = parser.parse_args(argv)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton

    import torch  # noqa: PLC0415

    from benchmarks.gpu import attention, checks, handoff, step  # noqa: PLC0415
    from benchmarks.gpu.timing import Bench, Ceilings  # noqa: PLC0415
    from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write  # noqa: PLC0415

    if not args.dry and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no CUDA device; --dry shows the plan on a CPU", file=sys.stderr)
        return 2
    bench = Bench.here(is_dry=args.dry)
    name = "dry run" if args.dry else torch.cuda.get_device_name()
    began = time.monotonic()
    ceilings = Ceilings.measure(bench)
    found = [
        Row(f"ceilings, {name}", "copy", "GB/s", ceilings.copy / 1e9, None, "", None, "reported", None, 0.0),
        Row(f"ceilings, {name}", "product", "TFLOP/s", ceilings.product / 1e12, None, "", None, "reported", None, 0.0),
    ]
    parts: dict[str, Callable[[], list[Row]]] = {
        "checks": lambda: checks.rows(bench),
        "attention": lambda: attention.rows(bench, ceilings),
        "step": lambda: step.rows(bench, ceilings),
        "handoff": lambda: handoff.rows(is_dry=args.dry),
    }
    code = 0
    for part, rows in parts.items():
        if args.only in (None, part):
            print(f"{time.monotonic() - began:6.1f} s  {part}", flush=True)
            try:
                with torch.inference_mode():
                    found += rows()
            except Exception as exc:  # what came before is worth its time, whatever this part died of
                found.append(Row(part, f"{type(exc).__name__}: {exc}"[:400], "", 0.0, None, "", None, "runs", False, 0.0))
                code = 1
                if part == "checks":
                    break
    if args.dry:
        found = [row if row.case.startswith("check") else replace(row, target="", met=None) for row in found]
    directory = args.out or (QUICK_RESULTS if args.dry else RESULTS)
    write("gpu", found, " ".join(["python -m benchmarks.gpu", *argv]), {"gpu": name}, directory)
    return code or int(any(row.met is False for row in found if row.case.startswith("check")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
