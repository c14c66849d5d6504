"""One result file for every benchmark: machine, commit, command, versions, and rows whose ratio is larger when we are better."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = RESULTS.parents[1] / "build" / "results"  # of runs that only show whether something runs
PACKAGES = ("torch", "ucxx-cu12", "grpcio", "tokenizers", "uvloop")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `target` is a bound on `ratio` or on `ours`, said in words."""

    case: str
    metric: str
    unit: str
    ours: float
    opponent: float | None
    opponent_name: str
    ratio: float | None  # larger is better for us
    target: str
    met: bool | None
    spread: float  # half of the middle 80 % of ours, in units


def half_spread(values: Sequence[float]) -> float:
    """Half the distance between the 10th and 90th percentile."""
    if len(values) < 3:
        return 0.0
    tenths = statistics.quantiles(values, n=10)
    return (tenths[-1] - tenths[0]) / 2


def machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1048576
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory} GiB, Linux {platform.release().split('-')[0]}"


def commit() -> str:
    """`-dirty` when files differ from it; results, which a run of several benchmarks writes one by one, apart."""
    described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False).stdout.strip()
    elsewhere = ["--", ".", f":(exclude){RESULTS}"]  # in the short form, ":!/...", the slash would mean the top of the tree
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", *elsewhere], capture_output=True, check=False)
    return f"{described or 'unknown'}{'-dirty' if changed.returncode else ''}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # of another CUDA version, or where only kernels are measured
        return "not installed"


def write(
    name: str,
    rows: Sequence[Row],
    command: str | None = None,
    versions: Mapping[str, str] | None = None,
    directory: Path = RESULTS,
) -> Path:
    """Writes `<name>.json` into `directory` and prints the same as a table. `versions`: of opponents, beside our own."""
    report = {
        "benchmark": name,
        "machine": machine(),
        "commit": commit(),
        "command": command or " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parents[1]), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}, **(versions or {})},
        "rows": [asdict(row) for row in rows],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title=f"{name}: {report['machine']}, {report['commit']}", box=None, header_style="bold")
    for title in ("case", "metric", "ours", "opponent", "ratio", "target", "met"):
        table.add_column(title, justify="right" if title in ("ours", "opponent", "ratio") else "left")
    for row in rows:
        opponent = "" if row.opponent is None else f"{row.opponent:.4g} ({row.opponent_name})"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        met = "" if row.met is None else "yes" if row.met else "NO"
        table.add_row(row.case, row.metric, f"{row.ours:.4g} ± {row.spread:.2g} {row.unit}", opponent, ratio, row.target, met)
    Console(width=160).print(table)
    return path
