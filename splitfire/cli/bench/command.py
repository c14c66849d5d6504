"""`splitfire bench serve`: from flags to a table, a report and numbers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from splitfire.cli.bench import facts
from splitfire.cli.bench.arrivals import Shape, Window, mean_rate
from splitfire.cli.bench.flags import (
    AUTO,
    Slo,
    parse_count,
    parse_lengths,
    parse_names,
    parse_rates,
    parse_server,
    parse_time,
    refuse,
)
from splitfire.cli.bench.numbers import count_of
from splitfire.cli.bench.page import page
from splitfire.cli.bench.results import Results, as_json
from splitfire.cli.bench.run import Target
from splitfire.cli.bench.statistics import Cell, rows_of
from splitfire.cli.bench.sweep import Load, Sweep
from splitfire.cli.bench.tables import results_table, run_line
from splitfire.cli.bench.targets import KINDS, Variants, own_fleets, running_fleet
from splitfire.cli.bench.verdict import comparison, error_lines, sentences, warnings
from splitfire.cli.client import ServerError
from splitfire.cli.options import API_KEY_FILE, TLS_CA
from splitfire.core.errors import ConfigError, one_line
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model, served_name
from splitfire.core.secret_files import read_secret
from splitfire.core.workload_trace import Trace, read_mooncake

DEFAULT_COMPARISON = "split,aggregated"
DAY_S = 86_400.0
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Loads a fleet and shows how it holds."""


def _option(name: str, help_: str, metavar: str) -> Any:
    """Every flag is text and read by `flags`: what cannot be used gets one line, whichever it is."""
    return typer.Option(f"--{name}", envvar=f"SPLITFIRE_BENCH_{name.upper().replace('-', '_')}", help=help_, metavar=metavar)


@app.command()
def serve(
    server: Annotated[
        str | None,
        typer.Option(envvar="SPLITFIRE_SERVER", help="host:port of a router; default: fleets of this machine, started for it"),
    ] = None,
    model: Annotated[
        str, typer.Option(envvar="SPLITFIRE_MODEL", help="of such fleets: pico, a model directory, or a hub id")
    ] = "pico",
    compare: Annotated[
        str | None, _option("compare", f"such fleets: of {', '.join(KINDS)}; default: {DEFAULT_COMPARISON}", "NAMES")
    ] = None,
    prefill: Annotated[str, _option("prefill", "prefill workers of such a fleet; they decode in the aggregated one", "N")] = "1",
    decode: Annotated[str, _option("decode", "decode workers of such a fleet", "N")] = "1",
    rates: Annotated[
        str | None, _option("rates", "requests a second, such as 1,2,4,8; auto, the default, doubles until goodput falls", "RATES")
    ] = None,
    duration: Annotated[str, _option("duration", "measured at each rate", "TIME")] = "30s",
    warmup: Annotated[str, _option("warmup", "before it, not counted", "TIME")] = "5s",
    rounds: Annotated[
        str | None, _option("rounds", "of everything, in turn; default: 2 when fleets are compared, else 1", "N")
    ] = None,
    prompt_tokens: Annotated[str, _option("prompt-tokens", "of a request: 256, or 64-512", "N")] = "256",
    output_tokens: Annotated[str, _option("output-tokens", "of its answer, exactly: 64, or 16-128", "N")] = "64",
    shared_prefix: Annotated[str, _option("shared-prefix", "so many of the prompt's tokens are the same in all", "N")] = "0",
    trace: Annotated[
        Path | None,
        _option("trace", "requests of a file in Mooncake's JSONL format instead, faster or slower as the rates say", "FILE"),
    ] = None,
    slo_ttft: Annotated[str, _option("slo-ttft", "a request is in time with its first token within this", "TIME")] = "500ms",
    slo_itl: Annotated[str, _option("slo-itl", "and with this or less between its tokens, in the mean", "TIME")] = "50ms",
    timeout: Annotated[str, _option("timeout", "an answer may take; then it failed", "TIME")] = "60s",
    seed: Annotated[str, _option("seed", "of instants and lengths", "N")] = "0",
    report: Annotated[Path | None, _option("report", "write the report here, one HTML file", "FILE")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", envvar="SPLITFIRE_BENCH_JSON", help="write the numbers here", metavar="FILE")
    ] = None,
    note: Annotated[str, _option("note", "what else a reader of the report should know", "TEXT")] = "",
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Sends requests at rising rates, whether or not others were answered, and shows TTFT, ITL and goodput."""
    if server is not None and compare is not None:
        raise ConfigError("--server and --compare: a running fleet is what it is; give one of them")
    names = parse_names("--compare", compare or DEFAULT_COMPARISON, KINDS)
    requests = _trace(trace)
    prompt, prefix = parse_lengths("--prompt-tokens", prompt_tokens), parse_count("--shared-prefix", shared_prefix, 0, 1_000_000)
    if prefix >= prompt.least:
        raise refuse("--shared-prefix", shared_prefix, f"fewer than --prompt-tokens, which are {prompt}")
    load = Load(
        rates=_rates(rates, requests),
        rounds=parse_count("--rounds", rounds or ("1" if server or len(names) == 1 else "2"), 1, 100),
        window=Window(parse_time("--warmup", warmup, 0, DAY_S), parse_time("--duration", duration, 0.1, DAY_S)),
        shape=Shape(prompt, parse_lengths("--output-tokens", output_tokens)),
        shared_prefix=prefix,
        trace=requests,
        slo=Slo(parse_time("--slo-ttft", slo_ttft, 1e-3, 3600), parse_time("--slo-itl", slo_itl, 1e-4, 60)),
        seed=parse_count("--seed", seed, 0, 10**18),
        timeout_s=parse_time("--timeout", timeout, 0.1, 3600),
    )
    workers = parse_count("--prefill", prefill, 1, 64), parse_count("--decode", decode, 1, 64)
    _check_writable("--report", report)
    _check_writable("--json", json_file)
    notes: list[str] = []
    if server is not None:
        variants = _running(parse_server("--server", server), api_key_file, tls_ca, notes.append)
    else:
        path = resolve_model(model)
        ModelDir(path)  # refuses what no service could load, before any is started
        variants = own_fleets(names, str(path), served_name(model, path), *workers, notes.append)
    head = {"command": shlex.join(["splitfire", *sys.argv[1:]]), **({"note": note} if note else {}), "load": describe(load)}
    head |= _circumstances(is_ours=server is None)
    sweep = Sweep(load, variants, _say, _tell(load.slo), notes)
    failure = _run(sweep)
    results = results_of(sweep, head)
    _show(results)
    _write("--report", report, lambda: page(results))
    _write("--json", json_file, lambda: json.dumps(as_json(results, sweep.cells)) + "\n")
    if failure is not None:
        raise failure
    raise typer.Exit(130 if sweep.is_cut else 0)


def describe(load: Load) -> str:
    """One line."""
    if load.trace is not None:
        what = f"{len(load.trace.arrivals)} requests of {load.trace.name}, {mean_rate(load.trace):.3g}/s as recorded"
    else:
        shared = f", {load.shared_prefix} of them shared" if load.shared_prefix else ""
        what = f"prompts of {load.shape.prompt} tokens{shared}, answers of {load.shape.output}, Poisson arrivals"
    rates = f"rates {', '.join(f'{rate:g}' for rate in load.rates)}" if load.rates else "rates doubled until goodput fell"
    times = f"{load.window.duration_s:g} s each after {load.window.warmup_s:g} s of warm-up"
    return f"{what}; {rates}; {times}; {count_of(load.rounds, 'round', 'rounds')}; seed {load.seed}"


def results_of(sweep: Sweep, head: dict[str, str]) -> Results:
    rows = rows_of(sweep.cells, sweep.load.slo)
    workers = {f"workers, {name}": workers for name, workers in sweep.workers.items()}
    models = " and ".join(dict.fromkeys(sweep.models.values())) or "nothing"
    notes = [*sweep.notes]
    if sweep.is_cut:
        notes.append("The run was ended before it was complete: what had been measured is here.")
    return Results(models, {**head, **workers}, sweep.load.slo, rows, sentences(rows), comparison(rows), warnings(rows), notes)


def _run(sweep: Sweep) -> Exception | None:
    """What ended it early, when something had been measured by then: the report is made all the same."""

    def ended(number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    try:
        sweep()
    except (ConfigError, ServerError) as exc:
        if not sweep.cells:
            raise
        sweep.notes.append(f"It ended early: {one_line(str(exc))}")
        return exc
    return None


def _rates(text: str | None, trace: Trace | None) -> tuple[float, ...]:
    if text is None and trace is not None:
        return (mean_rate(trace),)
    return parse_rates("--rates", text or AUTO)


def _trace(path: Path | None) -> Trace | None:
    if path is None:
        return None
    try:
        return read_mooncake(path)
    except ConfigError as exc:
        raise ConfigError(f"--trace: {exc}") from exc


def _running(server: str, api_key_file: Path | None, tls_ca: Path | None, say: Callable[[str], None]) -> Variants:
    authority = None
    if tls_ca is not None:
        from splitfire.core.tls import read_authority  # noqa: PLC0415 - 160 ms, only if used

        authority = read_authority(tls_ca)
    key = read_secret(api_key_file) if api_key_file is not None else None
    return running_fleet(server, Target(server, key, authority), say)


def _circumstances(*, is_ours: bool) -> dict[str, str]:
    found = {"machine" if is_ours else "machine of the client": facts.machine(), "commit": facts.commit()}
    found |= {"versions": facts.versions(), "time": facts.now()}
    if is_ours:
        found["settings"] = facts.worker_settings(os.environ)
    return {name: value for name, value in found.items() if value}


def _say(line: str) -> None:
    err.print(line, style="dim", markup=False)


def _tell(slo: Slo) -> Callable[[Cell], None]:
    def tell(cell: Cell) -> None:
        for row in rows_of([cell], slo):
            err.print(run_line(row), markup=False)

    return tell


def _show(results: Results) -> None:
    if results.rows:
        out.print(results_table(results))
    for line in (*error_lines(results.rows), *results.sentences, *filter(None, [results.comparison])):
        out.print(line, markup=False)
    for line in (*results.warnings, *results.notes):
        out.print(line, style="yellow", markup=False)


def _check_writable(flag: str, path: Path | None) -> None:
    """Before an hour of measuring, not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise refuse(flag, str(path), "a file that can be written, in a directory that exists")


def _write(flag: str, path: Path | None, content: Callable[[], str]) -> None:
    if path is None:
        return
    try:
        path.write_text(content(), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{flag}: {path.name} cannot be written: {exc.strerror or exc}") from exc
    err.print(f"{flag.lstrip('-')}: {path}", markup=False)
