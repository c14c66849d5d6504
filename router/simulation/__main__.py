"""`python -m router.simulation`: what `splitfire simulate` and the second half of `splitfire advise` run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from router.simulation import runs
from router.simulation.advice import LOADS, Mix, Targets, advise, capacity, default_targets
from router.simulation.profile import read_profile
from router.simulation.tables import advice_table, results_table
from splitfire.core.errors import ConfigError
from splitfire.core.flags import exit_with

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Routing and ratios, simulated.")
out = Console(highlight=False, soft_wrap=True)
JSON_FILE = Annotated[Path | None, typer.Option("--json", help="write the numbers here too")]


@app.command()
def simulate(
    workload: Annotated[str, typer.Argument(help="w8, conversation, toolagent, or a file in Mooncake's JSONL format")],
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="that do both; default: 4 for w8, else 8")] = None,
    prefill: Annotated[int, typer.Option(min=0, max=1024, help="prefill workers; the others decode")] = 0,
    policy: Annotated[list[str] | None, typer.Option(help=f"one or more of {', '.join(runs.POLICIES)}; default: all")] = None,
    load: Annotated[
        float | None,
        typer.Option(min=0.01, max=10, help="share of the workers' time that prompts take with one cache of all sizes"),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.01, max=100, help="of arrivals, when no load is given")] = 1.0,
    cache: Annotated[float, typer.Option(min=0.001, max=10, help="all caches together, as a share of the working set")] = 0.3,
    blocks: Annotated[int | None, typer.Option(min=1, help="of each worker's cache, instead")] = None,
    requests: Annotated[int | None, typer.Option(min=2, max=1_000_000, help="of a generated trace; default: an hour's")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="runs with different seeds, averaged")] = 1,
    profile: Annotated[Path | None, typer.Option(help="of the engine, as `splitfire advise` measured it")] = None,
    json_file: JSON_FILE = None,
) -> None:
    """Serves a trace with the router's own placement, index and admission, under every policy."""
    case = runs.Case(
        workload, workers, prefill, load, speed, cache, blocks, requests, seeds, read_profile(profile) if profile else None
    )
    results = {}
    for name in policy or runs.POLICIES:
        with Console(stderr=True).status(f"{workload}: {name}"):
            results[name] = runs.run(case, name)
    out.print(results_table(workload, results))
    _write(json_file, {"case": str(case), "results": {name: asdict(result) for name, result in results.items()}})


@app.command("advise")
def advise_command(
    profile: Annotated[Path, typer.Option(help="what was measured")],
    workers: Annotated[int, typer.Option(min=2, max=64, help="to divide")] = 4,
    prompt: Annotated[int, typer.Option(min=1, max=1_000_000, help="tokens of a prompt, at the mean")] = 400,
    output: Annotated[int, typer.Option(min=2, max=1_000_000, help="tokens of an answer, at the mean")] = 120,
    rate: Annotated[list[float] | None, typer.Option(min=1e-6, max=1e6, help="requests a second; default: several loads")] = None,
    ttft: Annotated[float | None, typer.Option(min=0.001, max=3600, help="target for its p90, in seconds")] = None,
    itl: Annotated[float | None, typer.Option(min=0.0001, max=60, help="target for the p99 of gaps between tokens")] = None,
    json_file: JSON_FILE = None,
) -> None:
    """Split or not, which ratio of prefill to decode workers, and when not to split."""
    measured = read_profile(profile)
    engine, mix = measured.engine(), Mix(prompt, output)
    fallback = default_targets(engine, mix)
    targets = Targets(ttft or fallback.ttft_p90, itl or fallback.itl_p99)
    rates = rate or [load * capacity(engine, workers, mix) for load in LOADS]
    with Console(stderr=True).status(f"simulating {workers} workers"):
        found = advise(engine, workers, mix, rates, targets)
    asked = f"{workers} workers, prompts of {prompt} tokens, answers of {output}"
    out.print(f"{measured.model}: {asked}; targets: TTFT p90 {targets.ttft_p90:.3g} s, ITL p99 {targets.itl_p99 * 1e3:.3g} ms")
    out.print(advice_table(found))
    for advice in found:
        out.print(advice.sentence())
    _write(json_file, {"profile": asdict(measured), "advice": [asdict(advice) for advice in found]})


def _write(path: Path | None, entry: object) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(entry, indent=1) + "\n")
    except OSError as exc:
        raise ConfigError(f"--json: {path.name} cannot be written: {exc.strerror or exc}") from exc


def main() -> None:
    try:
        sys.exit(app(standalone_mode=False, prog_name="splitfire", auto_envvar_prefix="SPLITFIRE") or 0)
    except ConfigError as exc:
        sys.exit(exit_with(exc))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer._click.exceptions.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
